"""A model directory with some layers replaced: whatever did not change is copied byte for byte."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora import files, mlxlm, probe
from mlxlora import model as models
from mlxlora import weights as weight_files
from mlxlora.errors import ModelError
from mlxlora.parameters import flat, number

PARTS = ("weight", "scales", "biases", "global_scale")
LARGEST_DIFFERENCE = 1e-3  # between what was written, read back, and what was meant, in log-probabilities
CHECKED = 64  # tokens


def write_model(
    directory: Path,
    source: Path,
    network: nn.Module,
    config: dict[str, Any],
    changed: set[str],
    quantized: dict[str, Any] | None,
) -> None:
    """Fill `directory` with the model of `source` in which the tensors of the modules and weights `changed` are new.

    network:   the whole network as it is to be
    config:    its configuration as it was loaded
    changed:   paths of modules, or of single weights
    quantized: entries of the quantization by module path that differ from before; None: no quantization is left
    """
    tensors: dict[str, mx.array] = flat(network.parameters())
    shards = {path: files.check_safetensors(path) for path in weight_files.weight_files(source)}
    stored = {name for shard in shards.values() for name in shard}
    before = {name for name in tensors if not _is_changed(name, changed)}
    as_loaded = before <= stored and {name for name in stored if not _is_changed(name, changed)} == before
    if not as_loaded:  # the directory has other names for its tensors than the network
        settings = _with_quantization(config, quantized)
        models.write_directory(directory, network, settings, source=source)
        return
    _write_shards(directory, shards, tensors, changed)
    stored_config = files.read_json(source / "config.json")
    settings = _with_quantization(stored_config, quantized)
    if settings == stored_config:
        shutil.copyfile(source / "config.json", directory / "config.json")
    else:
        files.write_json(directory / "config.json", settings)
    index = source / "model.safetensors.index.json"
    if index.is_file():
        _write_index(directory, index, changed)
    models.copy_files(source, directory, (*models.TOKENIZER_FILES, *models.CARRIED))


def _is_changed(name: str, changed: set[str]) -> bool:
    path, _, part = name.rpartition(".")
    return name in changed or (path in changed and part in PARTS)


def _write_shards(directory: Path, shards: dict[Path, Any], tensors: dict[str, mx.array], changed: set[str]) -> None:
    placed: set[str] = set()
    for path, header in shards.items():
        if not any(_is_changed(name, changed) for name in header):
            shutil.copyfile(path, directory / path.name)
            continue
        kept = {name: tensors[name] for name in header if name in tensors}
        # scales of a layer that was not quantized before go where its weight is
        homes = {name.rpartition(".")[0] for name in header if name.endswith(".weight")}
        new = [name for name in tensors if _is_changed(name, changed) and name.rpartition(".")[0] in homes]
        kept |= {name: tensors[name] for name in new if name not in placed}
        placed |= kept.keys()
        files.save_safetensors(directory / path.name, kept, {"format": "mlx"})
        mx.clear_cache()


def _write_index(directory: Path, index: Path, changed: set[str]) -> None:
    """The index of the shards as they are now; byte for byte the old one when nothing in it changed."""
    content = files.read_json(index)
    places: dict[str, str] = {}
    size = 0
    for path in sorted(directory.glob("model*.safetensors")):
        header = files.check_safetensors(path)
        places |= dict.fromkeys(header, path.name)
        size += sum(array.nbytes for array in files.load_safetensors(path).values())
    content.setdefault("metadata", {})
    if content.get("weight_map") == places and (not changed or content["metadata"].get("total_size") == size):
        shutil.copyfile(index, directory / index.name)
        return
    content["weight_map"] = dict(sorted(places.items()))
    content["metadata"]["total_size"] = size
    files.write_json(directory / index.name, content)


def _with_quantization(config: dict[str, Any], quantized: dict[str, Any] | None) -> dict[str, Any]:
    """`config` with other entries for some layers."""
    if quantized is None:
        return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    if not quantized:
        return config
    name = "quantization" if "quantization" in config else "quantization_config"
    old = config[name]
    default = {key: value for key, value in old.items() if not isinstance(value, (dict, bool))}
    default.setdefault("mode", "affine")
    entries = {path: entry for path, entry in old.items() if isinstance(entry, (dict, bool)) and path not in quantized}
    for path, entry in quantized.items():
        if entry is False or any(default.get(key) != value for key, value in entry.items()):
            entries[path] = entry
    plain = {key: value for key, value in old.items() if not isinstance(value, (dict, bool))}
    made = {**plain, **entries}
    if made == old:
        return config
    return {**config, "quantization": made, "quantization_config": made}


def read_back(directory: Path, network: nn.Module, rows: list[list[int]], *, trust_remote_code: bool = False) -> str:
    """Load what was written by mlx-lm's loader and compare it with what was meant; returns a line that says so.

    Raises ModelError when they differ.
    """
    row = rows[0][:CHECKED]
    again, _ = models.load_network(directory, trust_remote_code=trust_remote_code)
    meant, read = probe.log_probs(network, row), probe.log_probs(again, row)
    largest = number(mx.abs(meant - read).max())
    if not largest <= LARGEST_DIFFERENCE:
        raise ModelError(
            f"mlx-lm reads back another model than was meant: log-probabilities differ by {largest:.2g}. "
            "Nothing was written."
        )
    return f"read back by mlx-lm {mlxlm.version()}, {len(row)} tokens, max |Δ logprob| {largest:.1g}"
