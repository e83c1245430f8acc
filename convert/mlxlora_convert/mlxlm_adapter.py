"""Adapters of mlx-lm, out and in: today's layout and those that came before it.

    today             adapters.safetensors, and adapter_config.json with fine_tune_type, num_layers, lora_parameters
    until autumn 2024 lora_layers instead of num_layers, use_dora instead of fine_tune_type
    until summer 2024 lora_parameters has an alpha, too, and the scale is scale · alpha / rank; later files kept the
                      alpha and ignored it
    first             adapters.npz, without any configuration; experts' lora_a as [r·E, in]

Where a file does not say which scale it was trained with, it is refused and the scale is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxlora import files, mlxlm
from mlxlora.adapters import weights
from mlxlora.adapters.checks import CONFIG, PARTS, WEIGHTS
from mlxlora.adapters.files import Adapter, Module, write_adapter
from mlxlora.adapters.inject import get_module
from mlxlora.adapters.select import block_paths
from mlxlora.errors import AdapterError, ConfigError, FormatError, MlxLoraError, Problem, UnsupportedError
from mlxlora.model import load_network
from mlxlora_convert.jobs import ExportJob, ImportJob
from mlxlora_convert.lowrank import Place
from mlxlora_convert.mlxlm_options import MlxLmOptions
from mlxlora_convert.ours import BaseModel, from_lowrank, read_one, write_checked
from mlxlora_convert.probe import Probe, ReadBack, streamed

BOUND = 1e-3
ARCHIVE = "adapters.npz"


# ---- out ----------------------------------------------------------------------------------------------------------


def write(job: ExportJob) -> list[str]:
    """Write an adapter of ours for stock mlx-lm: one rank, one scale, no manifest."""
    model = BaseModel.open(job.base, revision=job.revision, trust_remote_code=job.trust_remote_code)
    adapter, parts = read_one(job.adapter, model, any_base=job.any_base)
    _refuse_own_kinds(parts, model.network)
    write_adapter(job.out, from_lowrank(parts, model, dropout=adapter.dropout))
    (job.out / files.MANIFEST).unlink()
    ranks = {part.rank for part in parts.values()}
    return [f"mlx-lm knows one rank: {len(ranks)} ranks were filled up to {max(ranks)}."] if len(ranks) > 1 else []


def _refuse_own_kinds(paths: Iterable[str], network: nn.Module) -> None:
    """Raise UnsupportedError for modules on which mlx-lm knows no LoRA."""
    modules = {path: get_module(network, path) for path in sorted(paths)}
    why = (
        (weights.is_heads, "mlx-lm keeps this projection of multi-head latent attention as two layers of one matrix a "
                           "head and has no LoRA for these"),
        (weights.is_bare_router, "mlx-lm has no LoRA for a router that holds its matrix itself"),
    )  # fmt: skip
    for is_one, reason in why:
        if found := [path for path, module in modules.items() if is_one(module)]:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise UnsupportedError(
                f"{found[0]}{more}: {reason}. Fuse the adapter into the model instead (mlxlora fuse), or train without "
                f"{found[0].rpartition('.')[2]} among its targets."
            )


def read_back(job: ExportJob, probe: Probe) -> ReadBack:
    """Run mlx-lm's own loader and layers on what was written."""
    model = BaseModel.open(job.base, revision=job.revision, trust_remote_code=job.trust_remote_code)

    def adapted() -> nn.Module:
        network, _ = load_network(model.path, trust_remote_code=job.trust_remote_code)
        mlxlm.load_adapters(network, job.out)
        return network

    try:
        theirs = streamed(adapted, probe.tokens)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise MlxLoraError(
            f"mlx-lm cannot read this adapter: {str(error).splitlines()[0]}. Nothing was written. It has no DoRA on "
            "weights of 3, 5 and 6 bits; there, fuse the adapter into the model instead."
        ) from error
    return probe.compare("mlx-lm", theirs, BOUND)


# ---- in -----------------------------------------------------------------------------------------------------------


def read(job: ImportJob) -> list[str]:
    """Read an adapter that mlx-lm made, of any age, checked against its base model."""
    source = job.source if job.source.is_dir() else job.source.parent
    if (source / files.MANIFEST).exists():
        raise ConfigError(
            f"{source} was made by mlxlora and is bound to its base by {files.MANIFEST}. Use it as it is: --adapter."
        )
    settings = _settings(source)
    model = BaseModel.open(
        job.needs_model("mlx-lm adapter"), revision=job.revision, trust_remote_code=job.trust_remote_code
    )
    kind = _kind(settings)
    grouped = _grouped(_tensors(job.source if job.source.is_file() else source), kind, model.places)
    scale, notes = _scale(settings, grouped, job.option(MlxLmOptions))
    adapter = Adapter(
        kind,
        {path: Module(arrays, scale) for path, arrays in grouped.items()},
        dropout=_dropout(settings),
        layers=len(block_paths(model.network)),
        base=model.fingerprint,
        base_name=model.name,
    )
    _check_ranks(adapter, settings)
    write_checked(job.out, adapter, model)
    return [*notes, *model.unlike(settings.get("model"))]


def _settings(source: Path) -> dict[str, Any]:
    if not (source / CONFIG).exists():
        return {}
    settings = files.read_json(source / CONFIG)
    if not isinstance(settings, dict):
        raise FormatError(f"{source / CONFIG} holds no object.")
    if "peft_type" in settings:
        raise FormatError(f"{source / CONFIG} is PEFT's, not mlx-lm's: import it with --format peft.")
    parameters = settings.get("lora_parameters", {})
    if not isinstance(parameters, dict):
        raise FormatError(f"{source / CONFIG}: lora_parameters is no object.")
    problems = [
        Problem(f"{CONFIG}: {name}", f"expected a number within ±10000, found {parameters[name]!r}")
        for name in ("scale", "alpha")
        if name in parameters and not _number(parameters[name])
    ]
    dropout = parameters.get("dropout", 0.0)
    if not _number(dropout) or not 0 <= dropout < 1:
        problems.append(Problem(f"{CONFIG}: dropout", f"expected a number from 0 to below 1, found {dropout!r}"))
    if problems:
        raise FormatError.of("adapter_config.json holds impossible values:", problems)
    return settings


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e4


def _dropout(settings: Mapping[str, Any]) -> float:
    return float(settings.get("lora_parameters", {}).get("dropout", 0.0))


def _kind(settings: Mapping[str, Any]) -> str:
    kind = settings.get("fine_tune_type", "dora" if settings.get("use_dora") else "lora")
    if kind == "full":
        raise UnsupportedError(
            "This is no adapter but a whole model's worth of weights (fine_tune_type full). Put them into the model "
            "with mlx_lm.fuse and use that."
        )
    if not isinstance(kind, str) or kind not in PARTS:
        raise FormatError(f"{CONFIG}: fine_tune_type: expected lora or dora, found {kind!r}.")
    return kind


def _tensors(source: Path) -> dict[str, mx.array]:
    path = source
    if source.is_dir():
        path = source / WEIGHTS if (source / WEIGHTS).exists() else source / ARCHIVE
    if path.suffix != ".npz":
        return files.load_safetensors(path)
    tensors = {}
    for name, stream in files.zip_members(path):
        try:
            array = np.lib.format.read_array(stream, allow_pickle=False)
        except (ValueError, EOFError, SyntaxError, TypeError, MemoryError) as error:
            raise FormatError(f"{path}: {name} is no numpy array, or was cut off: {error}") from None
        if array.dtype.kind != "f":
            raise FormatError(f"{path}: {name} holds {array.dtype}, expected floating-point numbers.")
        tensors[name.removesuffix(".npy")] = mx.array(array.astype(np.float32))
    if not tensors:
        raise FormatError(f"{path} holds no tensors.")
    return tensors


def _grouped(tensors: Mapping[str, mx.array], kind: str, places: Mapping[str, Place]) -> dict[str, dict[str, mx.array]]:
    """The tensors by module path, with the experts' old layout brought up to date."""
    grouped: dict[str, dict[str, mx.array]] = {}
    problems = []
    for name, tensor in sorted(tensors.items()):
        path, _, part = name.rpartition(".")
        if part not in PARTS[kind] or not path:
            expected = ", ".join(PARTS[kind])
            problems.append(Problem(name, f"is no part of a {kind} adapter (expected {expected})"))
        elif not mx.issubdtype(tensor.dtype, mx.floating):
            problems.append(Problem(name, f"expected floating-point numbers, found {tensor.dtype}"))
        else:
            grouped.setdefault(path, {})[part] = tensor.astype(mx.float32)
    for path, arrays in grouped.items():
        missing = [part for part in PARTS[kind] if part not in arrays]
        problems += [Problem(f"{path}.{part}", "is missing from the file") for part in missing]
        place = places.get(path)
        if place is not None and place.kind == "experts" and "lora_a" in arrays and arrays["lora_a"].ndim == 2:
            experts, _, in_ = place.shape
            if arrays["lora_a"].shape[0] % experts == 0 and arrays["lora_a"].shape[1] == in_:
                arrays["lora_a"] = arrays["lora_a"].reshape(experts, -1, in_)
    if problems:
        raise AdapterError.of("This mlx-lm adapter cannot be used:", problems)
    return grouped


def _check_ranks(adapter: Adapter, settings: Mapping[str, Any]) -> None:
    rank = settings.get("lora_parameters", {}).get("rank")
    if rank is not None and adapter.ranks != [rank]:
        wrong = next(path for path, module in sorted(adapter.modules.items()) if module.rank != rank)
        found = adapter.modules[wrong].rank
        raise AdapterError(f"{wrong}.lora_a: expected rank {rank} by {CONFIG}, found {found}.")


def _scale(
    settings: Mapping[str, Any], grouped: Mapping[str, Mapping[str, mx.array]], options: MlxLmOptions
) -> tuple[float, list[str]]:
    """The scale that the adapter was trained with. Raises AdapterError where the file leaves that open."""
    parameters = settings.get("lora_parameters", {})
    scale, alpha = parameters.get("scale"), parameters.get("alpha")
    if options.scale is not None:
        told = f"scale {scale:g}" if scale is not None else "no scale"
        return options.scale, [f"Scale {options.scale:g} as asked for; the file says {told}."]
    if scale is None:
        hint = f" It has alpha {alpha:g}, which mlx-lm never used alone." if alpha is not None else ""
        raise AdapterError(
            f"The adapter does not say its scale.{hint} Give it with --mlx_lm.scale (mlx-lm's default was 20)."
        )
    if alpha is None or "fine_tune_type" in settings or "num_layers" in settings:
        return float(scale), []  # whoever wrote these names ignored alpha
    rank = parameters.get("rank") or next(iter(grouped.values()))["lora_a"].shape[-1]
    old = float(scale) * float(alpha) / rank
    if math.isclose(old, scale):
        return float(scale), []
    raise AdapterError(
        f"The adapter's file is of 2024 and has both scale {scale:g} and alpha {alpha:g}. mlx-lm multiplied with "
        f"scale · alpha / rank = {old:g} until summer 2024 and with {scale:g} after. Say which with --mlx_lm.scale."
    )
