"""What the foreign formats ask a base model: which modules can carry an adapter, and what its tensors are."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import heads, weights
from mlxlora_convert.lowrank import Kind, Place


def places(network: nn.Module) -> dict[str, Place]:
    """Every module of a network without adapters that can carry one, by path, with the shape of its unpacked weight."""
    kinds: list[tuple[Callable[[nn.Module], bool], Kind]] = [
        (weights.is_linear, "linear"),
        (weights.is_embedding, "embedding"),
        (weights.is_experts, "experts"),
        (weights.is_heads, "linear"),
        (weights.is_bare_router, "linear"),
    ]
    modules: dict[str, nn.Module] = dict(network.named_modules())
    return {
        path: Place(kind, weights.shape(module))
        for path, module in (modules | heads.find(modules)).items()
        for fits, kind in kinds
        if fits(module)
    }


def tensors(network: nn.Module) -> Callable[[str], mx.array | None]:
    """A function from a tensor's name (`<path>.weight`) to its values in float32, unpacked; None where none is."""
    modules: dict[str, nn.Module] = dict(network.named_modules())
    modules |= heads.find(modules)

    def tensor(name: str) -> mx.array | None:
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if leaf == "weight" and isinstance(module, weights.Heads):
            return weights.dense(module)
        if module is None or not isinstance(module.get(leaf), mx.array):
            return None
        if leaf == "weight" and weights.quantization(module) is not None:
            return weights.dense(module)
        array: mx.array = module[leaf]
        return array.astype(mx.float32)

    return tensor
