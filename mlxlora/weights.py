"""Weight files of a model directory: found, checked, fingerprinted, and written in shards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxlora import files
from mlxlora.errors import InputError, ModelError, Problem
from mlxlora.progress import Progress

SHARD_BYTES = 2 << 30  # a shard is what a conversion holds in memory at once
_SAMPLES, _SAMPLE_BYTES = 256, 4096


def weight_files(directory: Path) -> list[Path]:
    """The safetensors shards of a model directory, in order.

    Raises ModelError when there are none, when the index names a shard that is missing, or when a shard is not a whole
    safetensors file.
    """
    directory = Path(directory)
    found = sorted(directory.glob("model*.safetensors"))
    index = directory / "model.safetensors.index.json"
    problems: list[Problem] = []
    if index.is_file():
        here = {path.name for path in found}
        problems += [
            Problem(name, "is named in model.safetensors.index.json, but is not there", "Copy or download it again")
            for name in sorted(_indexed(index) - here)
        ]
    if not found and not problems:
        torch = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        if torch:
            raise ModelError(
                f"{directory} holds PyTorch weights ({torch[0]}). Make them safetensors first: mlxlora convert"
            )
        raise ModelError(f"{directory} holds no weights: there is no model*.safetensors.")
    for path in found:
        try:
            files.check_safetensors(path)
        except InputError as error:
            problems.append(Problem(path.name, str(error)))
    if problems:
        raise ModelError.of(f"The weight files of {directory} cannot be used:", problems)
    return found


def _indexed(index: Path) -> set[str]:
    content = files.read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ModelError(f"{index} has no weight_map from tensors to files.")
    outside = sorted({name for name in names.values() if Path(name).name != name})
    if outside:
        raise ModelError(f"{index} names a file outside of the model directory: {outside[0]}")
    return set(names.values())


def read(directory: Path) -> dict[str, mx.array]:
    """All tensors of a model directory by name, mapped lazily. Raises ModelError when two shards hold the same name."""
    tensors: dict[str, mx.array] = {}
    for path in weight_files(directory):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        twice = sorted(tensors.keys() & loaded.keys())
        if twice:
            raise ModelError(f"{path} holds {twice[0]}, which another shard of {directory} holds, too.")
        tensors |= loaded
    return tensors


def write(
    directory: Path,
    tensors: dict[str, mx.array],
    *,
    shard_bytes: int = SHARD_BYTES,
    parameters: int | None = None,
    metadata: dict[str, str] | None = None,
    on_progress: Progress | None = None,
) -> list[Path]:
    """Write `tensors` as safetensors shards with their index, and empty the dictionary on the way.

    Tensors are computed shard by shard and let go when they are written, so that a model of lazily mapped weights
    passes through at the cost of one shard (unless the caller holds it, too). A tensor larger than `shard_bytes` gets
    a shard of its own.
    parameters: what the index says about the size of the model (default: the sum of the tensors' sizes)
    metadata:   of each shard (default: that its layout is MLX's)
    """
    plan: list[list[str]] = []
    size, total = 0, 0
    if parameters is None:
        parameters = sum(tensor.size for tensor in tensors.values())
    for name in sorted(tensors):
        grown = tensors[name].nbytes
        if not plan or (size + grown > shard_bytes and size):
            plan.append([])
            size = 0
        plan[-1].append(name)
        size += grown
        total += grown
    weight_map: dict[str, str] = {}
    paths = []
    for number, names in enumerate(plan, 1):
        one = len(plan) == 1
        path = directory / ("model.safetensors" if one else f"model-{number:05d}-of-{len(plan):05d}.safetensors")
        shard = {name: tensors.pop(name) for name in names}
        for tensor in shard.values():
            mx.eval(tensor)  # one by one: what it is made of (a wider source) is let go before the next
        mx.save_safetensors(str(path), shard, metadata=metadata or {"format": "mlx"})
        weight_map |= dict.fromkeys(names, path.name)
        paths.append(path)
        del shard
        mx.clear_cache()
        if on_progress is not None:
            on_progress("writing weights", number, len(plan))
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    files.write_json(directory / "model.safetensors.index.json", index)
    return paths


def fingerprint(directory: Path, config: dict[str, Any]) -> str:
    """SHA-256 over the configuration and the weight files of a model.

    Of each file: its size, its header, and 4 KiB at 256 evenly spaced places, so that a model of 100 GB is known in a
    tenth of a second. It tells one model from another; it is no proof against somebody who forges a file.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, ensure_ascii=False).encode())
    for path in weight_files(directory):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = int.from_bytes(file.read(8), "little")
            digest.update(f"{path.name} {size} {head}".encode())
            digest.update(file.read(head))
            start, room = 8 + head, size - 8 - head
            if room <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(_SAMPLES):
                file.seek(start + (room - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
