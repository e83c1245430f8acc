"""A GPU that is none: what the engine does on Metal and CUDA, computed on a CPU."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import pytest

import mlxlora.engine.engine  # all modules that ask on what they run


def pretend_accelerator(monkeypatch: pytest.MonkeyPatch, *, kernel: bool = True) -> list[Any]:
    """Let the engine take this machine for a GPU, with a fused kernel for attention or without; the list tells the
    mask of each call of that kernel.

    Without force MLX takes its fused kernel neither within a gradient nor for wide heads, and all scores exist at once.
    Steps stay uncompiled unless a test asks: on a CPU MLX would start a compiler for each of them.
    """
    plain, asked = mx.fast.scaled_dot_product_attention, []

    def fused(*arrays: mx.array, mask: Any, force_fused: bool = False, **others: Any) -> mx.array:
        if force_fused and not kernel:
            raise ValueError("no fused kernel is available")
        asked.extend([mask] if force_fused else [])
        return plain(*arrays, mask=mask, **others)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fused)
    for name, module in list(sys.modules.items()):
        if name.startswith("mlxlora.") and hasattr(module, "on_cpu") and module is not mlxlora.engine.config:
            monkeypatch.setattr(module, "on_cpu", lambda: False)
    return asked
