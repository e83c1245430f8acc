"""Our side of every adapter format: the base model, an adapter of ours as `LowRank`, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora import hub
from mlxlora.adapters.config import MAX_SCALE
from mlxlora.adapters.files import Adapter, Module, parse_spec, read_adapter, write_adapter
from mlxlora.adapters.select import block_paths
from mlxlora.adapters.state import check_fits
from mlxlora.errors import AdapterError, Problem, UnsupportedError
from mlxlora.model import fingerprint, load_network
from mlxlora_convert import base
from mlxlora_convert.lowrank import LowRank, Place

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+")  # where the hub's client keeps a model
# words of a name that tell the form of a model, not which one it is
_FORM = re.compile(
    r"\d*bits?|[bq]?f(?:loat)?\d+|mlx|hf|gguf|q\d|mxfp[48]|nvfp4|awq|gptq|dwq|bnb|unsloth|(?:de)?quantized"
)


@dataclass(eq=False)
class BaseModel:
    """The model that an adapter belongs to, its weights left on disk.

    source: what the user called it
    """

    source: str
    path: Path
    network: nn.Module
    config: dict[str, Any]

    @classmethod
    def open(cls, source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> BaseModel:
        """Find and check a model; weights are mapped, not read."""
        path = hub.find(source, revision=revision)
        network, config = load_network(path, trust_remote_code=trust_remote_code)
        return cls(source, path, network, config)

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every module that can carry an adapter."""
        return base.places(self.network)

    @cached_property
    def fingerprint(self) -> str:
        """What tells this base from any other."""
        return fingerprint(self.path)

    @property
    def hub_id(self) -> str:
        """The model's name on the hub, where the user or its config.json says one; never a place on this machine."""
        cached = _CACHED.search(str(self.path.absolute()))
        told = self.source if not Path(self.source).exists() else str(self.config.get("_name_or_path") or "")
        if HUB_ID.fullmatch(told) and not Path(told).exists():
            return told
        return "/".join(cached.groups()) if cached else ""

    @property
    def name(self) -> str:
        """What to call it in a file: its hub id, or the name of its directory without the way there."""
        return self.hub_id or self.path.resolve().name

    def unlike(self, named: object) -> list[str]:
        """A note where a file says that it was made for a model which is not called like this one.

        Nothing else tells models of the same shapes apart. Forms of one model (4 bits, a fork) pass for the same.
        """
        if not isinstance(named, str) or not _bare(named):
            return []
        known = {_bare(name) for name in (self.name, self.path.resolve().name, str(self.config.get("_name_or_path")))}
        if _bare(named) in known:
            return []
        return [
            f"The file says that it was made for '{named}'. It fits {self.name} by its shapes; "
            "if that is another model, the adapter is of no use there."
        ]


def _bare(name: str) -> str:
    """The last part of a model's name or place without the words that tell its form."""
    cached = _CACHED.search(name)
    last = cached[2] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    words = re.split(r"[^a-z0-9]+", last.lower())
    return "-".join(word for word in words if word and not _FORM.fullmatch(word))


def read_one(specs: tuple[str, ...], model: BaseModel, *, any_base: bool = False) -> tuple[Adapter, dict[str, LowRank]]:
    """The adapter named by `PATH` or `PATH=SCALE`, checked against its base, with the scale folded in.

    any_base: take one that was made for another model, as long as all shapes fit

    Raises UnsupportedError for several adapters and for one of type full, which no adapter format can hold.
    """
    if len(specs) != 1:
        raise UnsupportedError(
            f"An adapter file holds one adapter, {len(specs)} were given. Make one of them first: mlxlora merge"
        )
    path, factor = parse_spec(specs[0])
    adapter = read_adapter(path)
    if adapter.type == "full":
        raise UnsupportedError(f"{path} holds whole weights (type full), no low-rank update. Export the model instead.")
    check_fits(model.network, adapter, base=None if any_base else model.fingerprint)
    if adapter.type == "dora" and factor != 1:
        raise UnsupportedError("A DoRA adapter cannot be made stronger or weaker in a file. Leave its scale at 1.")
    return adapter, {path: part.scaled(factor) for path, part in to_lowrank(adapter, model.places).items()}


def to_lowrank(adapter: Adapter, places: Mapping[str, Place]) -> dict[str, LowRank]:
    """An adapter of ours as what it adds to each module. It must fit the base (`check_fits`)."""
    return {
        path: LowRank(
            places[path].kind,
            module.arrays["lora_a"],
            module.arrays["lora_b"],
            module.scale,
            module.arrays.get("m"),
        )
        for path, module in adapter.modules.items()
    }


def from_lowrank(
    parts: Mapping[str, LowRank], model: BaseModel, *, dropout: float = 0.0, config: dict[str, Any] | None = None
) -> Adapter:
    """What is added to each module as an adapter of ours, made for `model`.

    Raises UnsupportedError when only some modules carry DoRA's magnitude, which one adapter cannot say.
    """
    dora = {path for path, part in parts.items() if part.magnitude is not None}
    if dora and len(dora) < len(parts):
        plain = next(path for path in sorted(parts) if path not in dora)
        raise UnsupportedError(
            f"DoRA on {len(dora)} modules, none on others (such as {plain}): one adapter is one type."
        )
    modules = {}
    for path, part in parts.items():
        arrays = {"lora_a": part.a, "lora_b": part.b}
        if part.magnitude is not None:
            arrays["m"] = part.magnitude
        modules[path] = Module(arrays, part.scale)
    return Adapter(
        "dora" if dora else "lora",
        modules,
        dropout=dropout,
        layers=len(block_paths(model.network)),
        base=model.fingerprint,
        base_name=model.name,
        config=config or {},
    )


def write_checked(directory: Path, adapter: Adapter, model: BaseModel) -> None:
    """Write an adapter that came from outside, after every check that our own reader makes.

    Raises AdapterError, with all problems at once.
    """
    problems = []
    for path, module in sorted(adapter.modules.items()):
        if not abs(module.scale) <= MAX_SCALE:
            problems.append(Problem(path, f"expected a scale within ±{MAX_SCALE:g}, found {module.scale:g}"))
        problems += [
            Problem(f"{path}.{name}", "holds numbers that are not finite")
            for name, array in module.arrays.items()
            if not mx.all(mx.isfinite(array)).item()
        ]
    if problems:
        raise AdapterError.of("This adapter cannot be used:", problems)
    check_fits(model.network, adapter)
    write_adapter(directory, adapter)
