"""PyTorch's `.bin` weights, read by torch's safe loader alone, and written as safetensors.

A `.bin` file is a pickle: opened by anything but `torch.load(weights_only=True)` it may run any code it likes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora import weights
from mlxlora.errors import ModelError, UnsupportedError
from mlxlora.progress import Progress

PATTERNS = ("pytorch_model*.bin", "model*.bin")


def find(directory: Path) -> list[Path]:
    """The `.bin` weight files of a directory that has no safetensors; empty where it has some."""
    if any(directory.glob("model*.safetensors")) or (directory / "model.safetensors.index.json").exists():
        return []
    return sorted({path for pattern in PATTERNS for path in directory.glob(pattern)})


def to_safetensors(paths: list[Path], directory: Path, on_progress: Progress | None = None) -> None:
    """Write the tensors of `.bin` files as `model-….safetensors` into `directory`, one file at a time.

    Raises UnsupportedError when torch is not installed, ModelError when the safe loader refuses a file.
    """
    try:
        import torch
    except ImportError:
        raise UnsupportedError(
            f"{paths[0]} is a PyTorch file, and only torch's own safe loader may open it: pip install torch. "
            "Or look for a revision of the model with safetensors."
        ) from None
    for number, path in enumerate(paths, 1):
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # unpickling a hostile or broken file raises whatever it likes
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{path} is refused by torch's safe loader: {reason}") from None
        tensors = {name: _array(tensor) for name, tensor in _flat(path, loaded).items()}
        name = f"model-{number:05d}-of-{len(paths):05d}.safetensors"
        mx.save_safetensors(str(directory / name), tensors, metadata={"format": "pt"})
        del loaded, tensors
        if on_progress is not None:
            on_progress("reading PyTorch files", number, len(paths))
    weights.weight_files(directory)


def _flat(path: Path, loaded: Any) -> dict[str, Any]:
    import torch

    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise ModelError(f"{path} holds no state dict of tensors.")
    return {str(name): tensor for name, tensor in loaded.items()}


def _array(tensor: Any) -> mx.array:
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype is torch.bfloat16:  # numpy has no bfloat16: carry the bits
        return mx.array(tensor.view(torch.int16).numpy().view(np.uint16)).view(mx.bfloat16)
    return mx.array(tensor.numpy())
