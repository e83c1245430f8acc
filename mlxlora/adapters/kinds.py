"""Which adapter goes around which kind of module."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import weights
from mlxlora.adapters.dora import DoRAEmbedding, DoRAHeads, DoRALinear
from mlxlora.adapters.layer import AdapterLayer
from mlxlora.adapters.lora import LoRAEmbedding, LoRAHeads, LoRALinear, LoRARouter, LoRASwitchLinear
from mlxlora.errors import UnsupportedError

Layers = list[tuple[Callable[[nn.Module], bool], type[AdapterLayer]]]

LAYERS: dict[str, Layers] = {
    "lora": [
        (weights.is_linear, LoRALinear),
        (weights.is_embedding, LoRAEmbedding),
        (weights.is_experts, LoRASwitchLinear),
        (weights.is_heads, LoRAHeads),
        (weights.is_bare_router, LoRARouter),
    ],
    "dora": [
        (weights.is_linear, DoRALinear),
        (weights.is_embedding, DoRAEmbedding),
        (weights.is_heads, DoRAHeads),
    ],
}
"""Adapter type: which layer goes around which kind of module. A new type of adapter is one file and one entry here."""


def layer_type(kind: str, module: nn.Module) -> type[AdapterLayer]:
    """The adapter layer of this type for this module. Raises UnsupportedError where there is none."""
    for fits, layer in LAYERS[kind]:
        if fits(module):
            return layer
    raise UnsupportedError(f"{type(module).__name__} cannot carry {kind}.")


def can_carry(module: nn.Module, kind: str) -> bool:
    """Whether an adapter of this type can be put on this module; with `full`, whether its own weights can learn."""
    if kind == "full":
        return "scales" not in module and _has_floats(module)
    return any(fits(module) for fits, _ in LAYERS[kind])


def _has_floats(module: nn.Module) -> bool:
    arrays = [v for k, v in module.items() if isinstance(v, mx.array) and not k.startswith("_")]
    return any(mx.issubdtype(array.dtype, mx.floating) for array in arrays)
