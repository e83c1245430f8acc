"""An adapter by itself, and as a directory on the disk in mlx-lm's layout.

    adapters.safetensors   <module path>.lora_a, .lora_b (and .m for DoRA); with `full`, the trained weights themselves
    adapter_config.json    fine_tune_type, num_layers, lora_parameters {rank, scale, dropout, keys}: what mlx-lm reads
    manifest.json          ours: which base, which tensors, SHA-256 of both files; mlx-lm passes over it

mlx-lm knows one rank and one scale. Where the modules of an adapter differ, smaller ranks are filled up with zeros and
the quotient of the scales goes into B: the same function, readable by everybody. Adapters without a manifest (made by
mlx-lm) are read with all the checks that are possible without one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora import files
from mlxlora.adapters.checks import (
    CONFIG,
    FORMAT,
    PARTS,
    WEIGHTS,
    config_problems,
    listed_problems,
    manifest_problems,
    not_finite,
    rank_axes,
    shape_problems,
)
from mlxlora.adapters.config import MAX_SCALE
from mlxlora.commands import command
from mlxlora.errors import AdapterError, FormatError, InputError, Problem


@dataclass(frozen=True, slots=True)
class Module:
    """What one module of an adapter consists of.

    arrays: lora_a, lora_b and, for DoRA, m; float32, in the layouts that `lora.py` names
    scale:  what their product is multiplied with
    """

    arrays: dict[str, mx.array]
    scale: float

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        a = self.arrays["lora_a"]
        return int(a.shape[1] if a.ndim == 3 else a.shape[-1])


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter without a model.

    Attributes:
        type:      lora, dora or full
        modules:   by path; empty for full
        weights:   for full: the trained weights by parameter path, in the dtype of the base
        dropout:   with which it was trained
        layers:    number of blocks of the model that it was made for (0: not known)
        base:      fingerprint of the model that it was made for, None where the file does not say
        base_name: the name of that model, without its place on the disk
        config:    the settings that it was made with, as JSON; empty where the file does not say
    """

    type: str
    modules: dict[str, Module] = field(default_factory=dict)
    weights: dict[str, mx.array] = field(default_factory=dict)
    dropout: float = 0.0
    layers: int = 0
    base: str | None = None
    base_name: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        """The modules (for full: the weights) that it changes, ordered."""
        return sorted(self.weights if self.type == "full" else self.modules)

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, ordered."""
        return sorted({module.rank for module in self.modules.values()})

    @property
    def size(self) -> int:
        """Number of learned values."""
        parts = [array for module in self.modules.values() for array in module.arrays.values()]
        return sum(array.size for array in [*parts, *self.weights.values()])


def write_adapter(directory: Path, adapter: Adapter) -> None:
    """Fill an existing empty directory with the three files; the manifest comes last."""
    tensors, rank, scale = _uniform(adapter)
    mx.eval(tensors)
    files.save_safetensors(directory / WEIGHTS, tensors, {"format": "mlx"})
    settings: dict[str, Any] = {"fine_tune_type": adapter.type, "num_layers": adapter.layers}
    if adapter.type != "full":
        settings["lora_parameters"] = {
            "rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": adapter.paths,
        }  # fmt: skip
    files.write_json(directory / CONFIG, settings)
    files.write_json(
        directory / files.MANIFEST,
        {
            "format": FORMAT,
            "kind": "adapter",
            "type": adapter.type,
            "base": {"fingerprint": adapter.base, "name": adapter.base_name},
            "rank": rank,
            "scale": scale,
            "targets": adapter.paths,
            "modules": {path: {"rank": m.rank, "scale": m.scale} for path, m in sorted(adapter.modules.items())},
            "config": adapter.config,
            "tensors": {
                name: {"shape": list(array.shape), "dtype": str(array.dtype).rsplit(".", 1)[-1]}
                for name, array in sorted(tensors.items())
            },
            "files": files.file_records(directory, (WEIGHTS, CONFIG)),
        },
    )


def save_adapter(target: Path, adapter: Adapter, *, replace: bool = False) -> Path:
    """Write an adapter directory that appears whole or not at all.

    Raises InputError when `target` exists (unless `replace`).
    """
    with files.new_directory(Path(target), replace=replace) as scratch:
        write_adapter(scratch, adapter)
    return Path(target)


def _uniform(adapter: Adapter) -> tuple[dict[str, mx.array], int, float]:
    """The tensors as mlx-lm wants them, all of one rank and one scale, and these two."""
    if adapter.type == "full":
        return dict(adapter.weights), 0, 1.0
    rank = max(adapter.ranks, default=1)
    counted = Counter(module.scale for module in adapter.modules.values() if module.scale != 0)
    scale = counted.most_common(1)[0][0] if counted else 1.0
    tensors = {}
    for path, module in adapter.modules.items():
        for name, array in fitted(module, rank, scale).items():
            tensors[f"{path}.{name}"] = array
    return tensors, rank, scale


def fitted(module: Module, rank: int, scale: float) -> dict[str, mx.array]:
    """The arrays of `module` at a rank at least its own and at another scale: the same function."""
    a, b = module.arrays["lora_a"].astype(mx.float32), module.arrays["lora_b"].astype(mx.float32)
    if module.scale != scale:
        b = b * (module.scale / scale)
    missing = rank - module.rank
    if missing:
        axis_a, axis_b = rank_axes(a)
        a, b = _padded(a, axis_a, missing), _padded(b, axis_b, missing)
    return {**module.arrays, "lora_a": a, "lora_b": b}


def _padded(array: mx.array, axis: int, missing: int) -> mx.array:
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return mx.pad(array, widths)


# ---- reading ------------------------------------------------------------------------------------------------------


def find(path: str | Path) -> Path:
    """The adapter directory that is meant: itself, or that of a run (the best one, else the newest)."""
    path = Path(path)
    if (path / CONFIG).is_file() or (path / WEIGHTS).is_file():
        return path
    for name in ("best", "adapter"):
        if (path / name / CONFIG).is_file():
            return path / name
    if not path.exists():
        raise AdapterError(
            f"There is no adapter at {path}. Name a run, or a directory that holds adapters.safetensors."
        )
    if (path / "adapter_model.safetensors").is_file():
        raise AdapterError(f"{path} is an adapter of Hugging Face PEFT. Make it ours first: {command('import', path)}")
    raise AdapterError(
        f"{path} holds neither an adapter ({CONFIG}, {WEIGHTS}) nor a run with one in best/ or adapter/."
    )


def parse_spec(spec: str) -> tuple[Path, float]:
    """`PATH` or `PATH=SCALE` (1 when left out).

    Raises AdapterError for a scale that is no number, or not a sane one.
    """
    path, equals, number = str(spec).rpartition("=")
    if not equals or Path(spec).exists():
        return Path(spec), 1.0
    try:
        scale = float(number)
    except ValueError:
        raise AdapterError(f"{spec}: the scale must be a number, not {number!r}.") from None
    check_scale(scale, spec)
    return Path(path), scale


def check_scale(scale: float, where: str) -> None:
    """Raise AdapterError when a scale cannot be meant."""
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise AdapterError(f"{where}: the scale {scale!r} cannot be right; it must lie within ±{MAX_SCALE:g}.")


def read_adapter(path: str | Path) -> Adapter:
    """Read an adapter directory, or that of a run, with every check that needs no model.

    Raises AdapterError, with all problems at once: a file missing or changed since it was written (SHA-256), tensors
    missing, unknown, misshapen, not finite, or such as would replace weights of the base; a scale or rank that cannot
    be right; an unknown type. The header of the tensor file is checked before MLX maps it.
    """
    directory = find(path)
    settings = _object(directory / CONFIG)
    manifest = _object(directory / files.MANIFEST) if (directory / files.MANIFEST).exists() else None
    kind = settings.get("fine_tune_type", "lora")
    problems = config_problems(settings, kind)
    if manifest is not None:
        problems += manifest_problems(directory, manifest, kind)
    elif kind == "full":
        advice = (
            "It is a whole model's worth of weights from an unknown base; use the model that it belongs to instead."
        )
        problems.append(Problem(CONFIG, "fine_tune_type full without a manifest would replace base weights", advice))
    if problems:
        raise AdapterError.of(f"The adapter {directory} cannot be used:", problems)
    tensors = _tensors(directory)
    problems = listed_problems(tensors, manifest) if manifest else []
    adapter, more = (
        (Adapter("full", weights=tensors), []) if kind == "full" else _modules(kind, tensors, settings, manifest)
    )
    problems += more or not_finite(tensors)
    if problems:
        raise AdapterError.of(f"The adapter {directory} cannot be used:", problems)
    base = (manifest or {}).get("base", {})
    return dataclasses.replace(
        adapter,
        layers=_count(settings),
        base=base.get("fingerprint"),
        base_name=base.get("name", ""),
        config=(manifest or {}).get("config", {}),
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        content = files.read_json(path)
    except InputError as error:
        raise AdapterError(str(error)) from None
    if not isinstance(content, dict):
        raise AdapterError(f"{path} holds {type(content).__name__}, not an object.")
    return content


def _tensors(directory: Path) -> dict[str, mx.array]:
    try:
        return files.load_safetensors(directory / WEIGHTS)
    except FormatError as error:
        raise AdapterError(str(error)) from None


def _count(settings: dict[str, Any]) -> int:
    """Number of blocks; mlx-lm called it lora_layers until autumn 2024."""
    count = settings.get("num_layers", settings.get("lora_layers", 0))
    return count if isinstance(count, int) else 0


def _modules(
    kind: str, tensors: dict[str, mx.array], settings: dict[str, Any], manifest: dict[str, Any] | None
) -> tuple[Adapter, list[Problem]]:
    """Sort the tensors of a low-rank adapter by module."""
    parameters = settings["lora_parameters"]
    grouped: dict[str, dict[str, mx.array]] = {}
    problems = []
    for name, array in sorted(tensors.items()):
        path, _, part = name.rpartition(".")
        if part not in PARTS[kind] or not path:
            what = f"is no part of a {kind} adapter ({', '.join(PARTS[kind])}): it would replace a weight of the base"
            problems.append(Problem(name, what))
        elif not mx.issubdtype(array.dtype, mx.floating):
            problems.append(Problem(name, f"expected floating numbers, found {array.dtype}"))
        else:
            grouped.setdefault(path, {})[part] = array.astype(mx.float32)
    for path, arrays in grouped.items():
        problems += [Problem(f"{path}.{part}", "missing") for part in PARTS[kind] if part not in arrays]
        problems += shape_problems(path, arrays, parameters["rank"]) if {"lora_a", "lora_b"} <= arrays.keys() else []
    if not grouped and not problems:
        problems.append(Problem(WEIGHTS, "holds no tensors"))
    if problems:
        return Adapter(kind), problems
    ranks = (manifest or {}).get("modules", {})
    scale = float(parameters["scale"])
    modules = {path: _trimmed(Module(arrays, scale), ranks.get(path)) for path, arrays in grouped.items()}
    return Adapter(kind, modules, dropout=float(parameters.get("dropout", 0.0))), []


def _trimmed(module: Module, listed: Any) -> Module:
    """The module at the rank that the manifest names: what lies beyond was filled up with zeros."""
    rank = listed.get("rank") if isinstance(listed, dict) else None
    if not isinstance(rank, int) or not 0 < rank < module.rank:
        return module
    a, b = module.arrays["lora_a"], module.arrays["lora_b"]
    axis_a, axis_b = rank_axes(a)
    (a, rest_a), (b, rest_b) = mx.split(a, [rank], axis_a), mx.split(b, [rank], axis_b)
    if mx.any(rest_a != 0).item() or mx.any(rest_b != 0).item():
        return module
    return Module({**module.arrays, "lora_a": a, "lora_b": b}, module.scale)
