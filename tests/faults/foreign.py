"""Adapters of other programs under attack: what is imported from damaged files is refused, or a whole adapter."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests import tiny
from tests.faults.sound import scratch

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")
MLXLM_FILES = ("adapter_config.json", "adapters.safetensors")
Q = "model.layers.0.self_attn.q_proj"


@functools.cache
def base() -> Path:
    return tiny.model_directory(scratch() / "base", "llama")


@functools.cache
def sound_peft() -> Path:
    folder = scratch() / "peft"
    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "layers_to_transform": [0],
        "rank_pattern": {"v_proj": 3}, "alpha_pattern": {r".*\.k_proj": 7}, "bias": "none", "use_dora": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{Q}.lora_A.weight": mx.ones((2, 32)),
        f"base_model.model.{Q}.lora_B.weight": mx.ones((32, 2)),
    }
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    return folder


@functools.cache
def sound_mlxlm() -> Path:
    folder = scratch() / "mlxlm"
    folder.mkdir()
    parameters = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {f"{Q}.lora_a": mx.ones((32, 2)), f"{Q}.lora_b": mx.ones((2, 32))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    arrays: dict[str, Any] = {name: np.array(array) for name, array in tensors.items()}
    np.savez(scratch() / "adapters.npz", **arrays)
    return folder


def peft_seeds() -> list[bytes]:
    return [(sound_peft() / name).read_bytes() for name in PEFT_FILES]


def mlxlm_seeds() -> list[bytes]:
    files = [(sound_mlxlm() / name).read_bytes() for name in MLXLM_FILES]
    return [*files, (scratch() / "adapters.npz").read_bytes()]


def _copy(sound: Path, folder: Path, name: str, data: bytes) -> Path:
    target = folder / "damaged"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(sound, target)
    (target / name).write_bytes(data)
    return target


def place_peft(folder: Path, index: int, data: bytes) -> Path:
    return _copy(sound_peft(), folder, PEFT_FILES[index], data)


def place_mlxlm(folder: Path, index: int, data: bytes) -> Path:
    """Seeds 0 and 1: today's layout; 2: the first one, an archive without configuration."""
    if index < 2:
        return _copy(sound_mlxlm(), folder, MLXLM_FILES[index], data)
    target = folder / "damaged"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    (target / "adapters.npz").write_bytes(data)
    return target


def read(path: Path) -> Any:
    from mlxlora_convert.export import import_
    from mlxlora_convert.mlxlm_options import MlxLmOptions

    out = path.parent / "imported"
    shutil.rmtree(out, ignore_errors=True)
    bare = (path / "adapters.npz").exists()
    kind = "peft" if (path / "adapter_model.safetensors").exists() else "mlx-lm"
    options = MlxLmOptions(scale=2.0) if bare else None
    import_(path, out, model=str(base()), format=kind, mlx_lm=options)
    return out


def judge(path: Path, out: Path) -> None:
    """It fits the base, and holds the one module that the sound files have."""
    from mlxlora.adapters.files import read_adapter
    from mlxlora.adapters.state import check_fits
    from mlxlora.model import load_network

    adapter = read_adapter(out)
    check_fits(load_network(base())[0], adapter)
    assert adapter.paths, "nothing was imported"
