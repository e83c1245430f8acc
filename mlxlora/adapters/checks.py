"""What can be wrong with an adapter's files: every check says all that it finds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora.adapters.config import MAX_SCALE
from mlxlora.adapters.kinds import LAYERS
from mlxlora.errors import Problem
from mlxlora.files import MANIFEST, wrong_files

FORMAT = 1  # of the manifest
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
PARTS: dict[str, tuple[str, ...]] = {kind: table[0][1].learned for kind, table in LAYERS.items()} | {"full": ()}
"""The arrays of one module, by the type of the adapter."""


def rank_axes(lora_a: mx.array) -> tuple[int, int]:
    """Along which axes of A and of B the rank runs."""
    return (1, 2) if lora_a.ndim == 3 else (1, 0)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def config_problems(settings: dict[str, Any], kind: Any) -> list[Problem]:
    """What is wrong with adapter_config.json of an adapter of this type."""
    if not isinstance(kind, str) or kind not in PARTS:
        return [Problem(f"{CONFIG}: fine_tune_type", f"expected one of {', '.join(PARTS)}, found {kind!r}")]
    if kind == "full":
        return []
    parameters = settings.get("lora_parameters")
    if not isinstance(parameters, dict):
        return [Problem(f"{CONFIG}: lora_parameters", "expected an object with rank and scale, found none")]
    problems = []
    rank, scale, dropout = parameters.get("rank"), parameters.get("scale"), parameters.get("dropout", 0.0)
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        problems.append(Problem(f"{CONFIG}: rank", f"expected a whole number of at least 1, found {rank!r}"))
    if not _number(scale) or abs(float(scale or 0)) > MAX_SCALE:
        problems.append(Problem(f"{CONFIG}: scale", f"expected a number within ±{MAX_SCALE:g}, found {scale!r}"))
    if not _number(dropout) or not 0 <= dropout < 1:
        problems.append(Problem(f"{CONFIG}: dropout", f"expected a number from 0 to below 1, found {dropout!r}"))
    return problems


def manifest_problems(directory: Path, manifest: dict[str, Any], kind: Any) -> list[Problem]:
    """What is wrong with a manifest, or with the files that it lists."""
    if manifest.get("format") != FORMAT or manifest.get("kind") != "adapter":
        found = f"{manifest.get('kind')} of format {manifest.get('format')}"
        return [Problem(MANIFEST, f"expected an adapter of format {FORMAT}, found {found}")]
    problems = []
    if manifest.get("type") != kind:
        problems.append(Problem(f"{MANIFEST}: type", f"says {manifest.get('type')!r}, {CONFIG} says {kind!r}"))
    for part, kinds in (("tensors", dict), ("files", dict), ("modules", dict), ("base", dict), ("config", dict)):
        if not isinstance(manifest.get(part), kinds):
            problems.append(Problem(f"{MANIFEST}: {part}", "expected an object"))
    if problems:
        return problems
    base = manifest["base"]
    for part in ("fingerprint", "name"):
        found = base.get(part)
        if not isinstance(found, str) and (found is not None or part == "name"):
            problems.append(Problem(f"{MANIFEST}: base.{part}", f"expected text, found {found!r}"))
    return problems + wrong_files(directory, manifest["files"], (WEIGHTS, CONFIG))


def listed_problems(tensors: dict[str, mx.array], manifest: dict[str, Any]) -> list[Problem]:
    """Where the tensors differ from those that the manifest lists."""
    listed = manifest["tensors"]
    problems = [Problem(name, "missing: the manifest lists it") for name in sorted(listed.keys() - tensors.keys())]
    problems += [Problem(name, "the manifest does not list it") for name in sorted(tensors.keys() - listed.keys())]
    for name in sorted(tensors.keys() & listed.keys()):
        found = {"shape": list(tensors[name].shape), "dtype": str(tensors[name].dtype).rsplit(".", 1)[-1]}
        if found != listed[name]:
            problems.append(Problem(name, f"expected {listed[name]}, found {found}"))
    return problems


def shape_problems(path: str, arrays: dict[str, mx.array], rank: int) -> list[Problem]:
    """What is wrong with the shapes of one module's arrays."""
    a, b = arrays["lora_a"], arrays["lora_b"]
    found = f"{list(a.shape)} and {list(b.shape)}"
    if a.ndim != b.ndim or a.ndim not in (2, 3) or (a.ndim == 3 and a.shape[0] != b.shape[0]):
        return [Problem(path, f"lora_a and lora_b do not belong together: {found}")]
    axis_a, axis_b = rank_axes(a)
    if a.shape[axis_a] != rank or b.shape[axis_b] != rank:
        return [Problem(path, f"expected factors of rank {rank}, found {found}")]
    m = arrays.get("m")
    if m is not None and (m.ndim != 1 or m.shape[0] not in (b.shape[-1], a.shape[0])):
        return [Problem(f"{path}.m", f"expected {b.shape[-1]} magnitudes, found shape {list(m.shape)}")]
    return []


def not_finite(tensors: dict[str, mx.array]) -> list[Problem]:
    """Tensors that hold NaN or infinity."""
    bad = [
        name
        for name, array in sorted(tensors.items())
        if mx.issubdtype(array.dtype, mx.floating) and not mx.all(mx.isfinite(array)).item()
    ]
    return [Problem(name, "holds numbers that are not finite") for name in bad]
