"""An adapter in PEFT's form: configuration and state dict. peft_import.py is the way back.

PEFT keeps `base_model.model.<module>.lora_A.weight` [r, in] and `lora_B.weight` [out, r], for embeddings
`lora_embedding_A` [r, V] and `lora_embedding_B` [D, r], for DoRA `lora_magnitude_vector` [out], and for stacked experts
what peft_experts.py says. The scale of a module is alpha / r, or alpha / √r with rsLoRA.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import mlx.core as mx

from mlxlora.errors import ConfigError, UnsupportedError
from mlxlora_convert import peft_experts as stacks
from mlxlora_convert.lowrank import Adapter, LowRank, Place
from mlxlora_convert.names import ExpertPlace, Names, each_expert

PREFIX = "base_model.model."
INPUT_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")  # modules that a tied head shares its weight with


@dataclass(frozen=True)
class PeftOptions:
    """Options of `--to peft`."""

    base: str = ""
    """what adapter_config.json names as the base model, usually a hub id (default: where the model came from, if that
    is known)"""
    experts: Literal["parameters", "modules"] = "parameters"
    """parameters: LoRA on the stacked experts of transformers 5 (PEFT's target_parameters); modules: one LoRA for each
    expert, as transformers 4 needs"""

    def __post_init__(self) -> None:
        if self.base.startswith(("/", "~", "\\")) or ":" in self.base[:3]:
            raise ConfigError(f"--peft.base '{self.base}' is a path of this machine; give a hub id or leave it out.")
        if self.experts not in ("parameters", "modules"):
            raise ConfigError(f"--peft.experts must be parameters or modules, not '{self.experts}'.")


@dataclass(slots=True)
class _Target:
    """One LoRA as PEFT keeps it: `key` is where its tensors stand, `path` the module or parameter it acts on."""

    key: str
    path: str
    tensors: dict[str, mx.array]
    rank: int
    scale: float
    parameter: bool = False


@dataclass(slots=True)
class PeftState:
    """A PEFT adapter: its adapter_config.json, the tensors of adapter_model.safetensors, and what is to be said."""

    config: dict[str, Any]
    tensors: dict[str, mx.array]
    notes: list[str] = field(default_factory=list)


def to_peft(
    adapter: Adapter,
    names: Names,
    places: Mapping[str, Place],
    options: PeftOptions | None = None,
    *,
    rslora: bool = False,
    dropout: float = 0.0,
) -> PeftState:
    """An adapter as PEFT's configuration and state dict. Raises UnsupportedError for what PEFT cannot say.

    rslora: write the scales as alpha / √r, as they were chosen
    """
    options = options or PeftOptions()
    _refuse_mixed_dora(adapter)
    notes: list[str] = []
    targets: list[_Target] = []
    experts: dict[str, dict[str, tuple[ExpertPlace, LowRank]]] = defaultdict(dict)
    for path, part in sorted(adapter.items()):
        place = names.expert(path)
        if part.kind == "experts":
            if place is None:
                raise UnsupportedError(f"{path}: where transformers keeps these experts is not known here.")
            experts[place.holder][place.projection] = (place, part)
        elif part.kind == "embedding":
            targets += _embedding(path, part, names, places, notes)
        else:
            targets.append(_linear(names.to_hf(path), part, names))
    for holder, projections in experts.items():
        if options.experts == "modules":
            targets += [target for each in projections.values() for target in _single_experts(*each)]
        else:
            targets += _stacked_experts(holder, projections, places)
    if dropout and any(target.parameter for target in targets):
        dropout = 0.0
        notes.append("Dropout is written as 0: PEFT has none for stacked experts. It matters for training on alone.")
    config = _config(targets, names, places, options, rslora=rslora, dropout=dropout)
    config["use_dora"] = any(part.magnitude is not None for part in adapter.values())
    tensors = {f"{PREFIX}{target.key}.{name}": array for target in targets for name, array in target.tensors.items()}
    return PeftState(config, tensors, notes)


def _refuse_mixed_dora(adapter: Adapter) -> None:
    dora = [path for path, part in adapter.items() if part.magnitude is not None]
    plain = [path for path, part in adapter.items() if part.magnitude is None]
    wrong = [path for path in dora if adapter[path].kind != "linear"]
    if wrong:
        raise UnsupportedError(
            f"DoRA on {', '.join(sorted(wrong))}: PEFT scales the columns of an embedding, not its rows, and knows no "
            "DoRA on experts. Fuse the adapter into the model instead."
        )
    if dora and plain:
        raise UnsupportedError(
            f"PEFT applies DoRA to all modules of an adapter or to none; here {len(dora)} have it and {len(plain)} do "
            f"not (such as {sorted(plain)[0]}). Fuse the adapter into the model instead."
        )


def _linear(hf: str, part: LowRank, names: Names) -> _Target:
    tensors = {"lora_A.weight": part.a.T, "lora_B.weight": part.b.T}
    if part.magnitude is not None:
        tensors["lora_magnitude_vector"] = part.magnitude
    if names.is_parameter(hf):
        if part.magnitude is not None:
            raise UnsupportedError(
                f"DoRA on {hf}: PEFT reaches this layer only as a bare parameter, on which it knows no DoRA. "
                "Fuse the adapter into the model instead."
            )
        return _Target(hf, f"{hf}.weight", tensors, part.rank, part.scale, parameter=True)
    return _Target(hf, hf, tensors, part.rank, part.scale)


def tied_head(path: str, names: Names, places: Mapping[str, Place]) -> str | None:
    """For an embedding whose table is the output projection, too: what transformers calls that projection."""
    if path.rpartition(".")[2] not in INPUT_EMBEDDINGS or names.family.head in map(names.to_hf, places):
        return None
    return names.family.head


def _embedding(path: str, part: LowRank, names: Names, places: Mapping[str, Place], notes: list[str]) -> list[_Target]:
    hf = names.to_hf(path)
    tensors = {"lora_embedding_A": part.a.T, "lora_embedding_B": part.b.T}
    targets = [_Target(hf, hf, tensors, part.rank, part.scale)]
    head = tied_head(path, names, places)
    if head is not None:
        # one table serves as input and output here; PEFT adapts the two apart, so it gets the same update twice
        mirrored = {"lora_A.weight": part.b, "lora_B.weight": part.a}
        targets.append(_Target(head, head, mirrored, part.rank, part.scale))
        notes.append(f"{path} is tied to the output: its update is written for {hf} and for {head}.")
    return targets


def _single_experts(place: ExpertPlace, part: LowRank) -> list[_Target]:
    paths = [each_expert(place, number) for number in range(part.a.shape[0])]
    singles = [stacks.single(part, number) for number in range(len(paths))]
    return [
        _Target(path, path, {"lora_A.weight": one.a.T, "lora_B.weight": one.b.T}, one.rank, one.scale)
        for path, one in zip(paths, singles, strict=True)
    ]


def _stacked_experts(
    holder: str, projections: dict[str, tuple[ExpertPlace, LowRank]], places: Mapping[str, Place]
) -> list[_Target]:
    place = next(iter(projections.values()))[0]
    parts = {name: part for name, (_, part) in projections.items()}
    found: list[tuple[str, LowRank]] = []
    if "gate_proj" in parts or "up_proj" in parts:
        width = places[f"{place.mlx.rpartition('.')[0]}.gate_proj"].shape[1]
        both = stacks.fused(parts.get("gate_proj"), parts.get("up_proj"), width, interleaved=place.experts.interleaved)
        found.append(("gate_up_proj", both))
    if "down_proj" in parts:
        found.append(("down_proj", parts["down_proj"]))
    targets = []
    for number, (name, part) in enumerate(found):
        # PEFT nests one wrapper in the other; the parameter that the module declares first is the inner one
        key = holder + ".base_layer" * (len(found) - 1 - number)
        lora_a, lora_b = stacks.stacked(part)
        tensors = {"lora_A.weight": lora_a, "lora_B.weight": lora_b}
        targets.append(_Target(key, f"{holder}.{name}", tensors, part.rank, part.scale, parameter=True))
    return targets


def _config(
    targets: list[_Target],
    names: Names,
    places: Mapping[str, Place],
    options: PeftOptions,
    *,
    rslora: bool,
    dropout: float,
) -> dict[str, Any]:
    def alpha(target: _Target) -> float:
        value = target.scale * (math.sqrt(target.rank) if rslora else target.rank)
        return round(value) if math.isclose(value, round(value), rel_tol=1e-12) else value

    rank = Counter(target.rank for target in targets).most_common(1)[0][0]
    strength = Counter(alpha(target) for target in targets).most_common(1)[0][0]
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": options.base or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": strength,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "bias": "none",
        "fan_in_fan_out": names.family.conv1d,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _short([t.path for t in targets if not t.parameter], _linear_paths(names, places, options)),
        "rank_pattern": {target.path: target.rank for target in targets if target.rank != rank},
        "alpha_pattern": {target.path: alpha(target) for target in targets if alpha(target) != strength},
    }
    if parameters := sorted(target.path for target in targets if target.parameter):
        config["target_parameters"] = parameters
    return config


def _linear_paths(names: Names, places: Mapping[str, Place], options: PeftOptions) -> list[str] | None:
    """Every module that PEFT could target by name, or None when transformers has others beside those."""
    if not names.family.text:
        return None
    paths = []
    for path, place in places.items():
        expert = names.expert(path)
        if expert is None:
            paths.append(names.to_hf(path))
        elif options.experts == "modules" and expert.experts.each:
            paths += [each_expert(expert, number) for number in range(place.shape[0])]
    if names.family.head not in paths:
        paths.append(names.family.head)
    return paths


def _short(chosen: list[str], known: list[str] | None) -> list[str]:
    """The last words of the chosen paths, where no other module ends in them; else the whole paths."""
    ends = {path.rpartition(".")[2] for path in chosen}
    if known is not None and {path for path in known if path.rpartition(".")[2] in ends} == set(chosen):
        return sorted(ends)
    return sorted(chosen)
