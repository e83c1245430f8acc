"""The weight of a layer, whatever it is stored as: its true width, its values, and a like layer with other values."""

from __future__ import annotations

import copy
import inspect
import re
import sys
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora import mlxlm


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a weight is packed: as in `mx.quantize`."""

    group_size: int
    bits: int
    mode: str = "affine"

    def as_config(self) -> dict[str, Any]:
        """As an entry of `quantization` in a config.json that mlx-lm reads."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


JOINED, KEYS, VALUES = "kv_b_proj", "embed_q", "unembed_out"  # in the attention modules that `heads.py` describes


class Heads(nn.Module):
    """The two layers that mlx-lm makes of MLA's `kv_b_proj`, as one linear layer from R to H·(N+V); see `heads.py`.

    It stands nowhere in a network and holds no parameters of its own.
    """

    halves: dict[str, nn.Module]

    def __init__(self, keys: nn.Module, values: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        object.__setattr__(self, "halves", {KEYS: keys, VALUES: values})
        self.train(keys.training)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, N and V."""
        heads, _, keys = shape(self.halves[KEYS])
        return heads, keys, shape(self.halves[VALUES])[1]

    def together(self, keys: mx.array, values: mx.array) -> mx.array:
        """The one matrix [H·(N+V), R] of what the halves hold, [H, R, N] and [H, V, R]."""
        return mx.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, values.shape[-1])

    def apart(self, matrix: mx.array) -> dict[str, mx.array]:
        """What the halves hold of a matrix [H·(N+V), R]."""
        heads, keys, _ = self.sizes
        each = matrix.reshape(heads, -1, matrix.shape[-1])
        return {KEYS: each[:, :keys].swapaxes(1, 2), VALUES: each[:, keys:]}

    def __call__(self, x: mx.array) -> mx.array:
        """[L, R] → [L, H·(N+V)]"""
        keys: Any = self.halves[KEYS]
        values: Any = self.halves[VALUES]
        each = mx.concatenate([keys(x[None], transpose=False), values(x[None])], axis=-1)
        return each.swapaxes(0, 1).reshape(len(x), -1)


def is_bare_router(module: nn.Module) -> bool:
    """A router of experts that holds its matrix itself, [experts, in], instead of in a linear layer.

    In mlx-lm's models these are classes of their own in every file, called …Gate or …Router, with x Wᵀ in their call.
    """
    weight = module.get("weight")
    if not isinstance(weight, mx.array) or weight.ndim != 2 or not mx.issubdtype(weight.dtype, mx.floating):
        return False
    return re.search(r"(Gate|Router)$", type(module).__name__) is not None and "scales" not in module


def is_heads(module: nn.Module) -> bool:
    """MLA's `kv_b_proj`, which mlx-lm splits."""
    return isinstance(module, Heads)


def is_half(module: nn.Module) -> bool:
    """One of the two layers of a `Heads`: mlx-lm's `MultiLinear`, plain or packed."""
    return _same_call(module, *_half_types())


def _half_types() -> tuple[type[Any], ...]:
    """mlx-lm's `MultiLinear` and `QuantizedMultiLinear`; empty while no model that could hold one has been loaded."""
    if "mlx_lm.models.mla" not in sys.modules:
        return ()
    layers = mlxlm.module("models.mla")
    return layers.MultiLinear, layers.QuantizedMultiLinear


def is_linear(module: nn.Module) -> bool:
    """A linear layer that computes what `nn.Linear` or `nn.QuantizedLinear` does, not a subclass with its own."""
    return _same_call(module, nn.Linear, nn.QuantizedLinear)


def is_embedding(module: nn.Module) -> bool:
    """A table of embeddings that computes what `nn.Embedding` or `nn.QuantizedEmbedding` does."""
    return _same_call(module, nn.Embedding, nn.QuantizedEmbedding)


def is_experts(module: nn.Module) -> bool:
    """The stacked linear layers of a mixture of experts, as in mlx-lm's models."""
    return _same_call(module, *switch_types())


def switch_types() -> tuple[type[Any], ...]:
    """mlx-lm's `SwitchLinear` and `QuantizedSwitchLinear`; empty while no model that could hold one has been loaded."""
    if "mlx_lm.models.switch_layers" not in sys.modules:
        return ()
    layers = mlxlm.switch_layers()
    return layers.SwitchLinear, layers.QuantizedSwitchLinear


def _same_call(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    call = inspect.unwrap(type(module).__call__)  # full fine-tuning and checkpointing put a wrapper around it
    return any(isinstance(module, kind) and call is kind.__call__ for kind in kinds)


def quantization(layer: nn.Module) -> Quantization | None:
    """How the weight of `layer` is packed, or None where it is not."""
    if "scales" not in layer:
        return None
    return Quantization(layer.group_size, layer.bits, layer.mode)


def shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape that the weight has when it is not packed: [out, in], or [experts, out, in].

    The width comes from the scales, one for each group, because `32 // bits` is no whole number for 3, 5 and 6 bits.
    """
    if isinstance(layer, Heads):
        heads, keys, values = layer.sizes
        return heads * (keys + values), shape(layer.halves[VALUES])[-1]
    *rows, width = layer["weight"].shape
    packed = quantization(layer)
    return (*rows, layer["scales"].shape[-1] * packed.group_size if packed else width)


def dtype(layer: nn.Module) -> mx.Dtype:
    """The floating dtype that the layer computes in when its input has it too; float32 where the layer does not say."""
    if isinstance(layer, Heads):
        return dtype(layer.halves[VALUES])
    packed = quantization(layer)
    kept: mx.array = layer["scales"] if packed else layer["weight"]
    if mx.issubdtype(kept.dtype, mx.floating):
        return kept.dtype
    bias: mx.array | None = layer.get("bias")
    return mx.float32 if bias is None else bias.dtype


def dense(layer: nn.Module) -> mx.array:
    """The values of the weight in float32, unpacked where they are packed."""
    if isinstance(layer, Heads):
        return layer.together(dense(layer.halves[KEYS]), dense(layer.halves[VALUES]))
    packed = quantization(layer)
    weight: mx.array = layer["weight"]
    if packed is None:
        return weight.astype(mx.float32)
    scales: mx.array = layer["scales"]
    common: dict[str, Any] = {"group_size": packed.group_size, "bits": packed.bits, "mode": packed.mode}
    if packed.mode == "affine":
        biases: mx.array = layer["biases"]
        return mx.dequantize(weight, scales.astype(mx.float32), biases.astype(mx.float32), **common)
    overall = layer.get("global_scale")
    if overall is None:
        return mx.dequantize(weight, scales, dtype=mx.float32, **common)
    each = [
        mx.dequantize(weight[i], scales[i], global_scale=overall[i], dtype=mx.float32, **common)
        for i in range(weight.shape[0])
    ]
    return mx.stack(each)


def matmul(layer: nn.Module, x: mx.array) -> mx.array:
    """x Wᵀ for a linear layer, plain or packed, without its bias."""
    if isinstance(layer, Heads):
        return layer(x)
    packed = quantization(layer)
    weight: mx.array = layer["weight"]
    if packed is None:
        return x @ weight.T
    return mx.quantized_matmul(
        x,
        weight,
        scales=layer["scales"],
        biases=layer.get("biases"),
        transpose=True,
        group_size=packed.group_size,
        bits=packed.bits,
        mode=packed.mode,
    )


def pack(weight: mx.array, packed: Quantization, kept: mx.Dtype) -> dict[str, mx.array]:
    """`weight`, scales and, where the mode has them, biases of a weight, rounded to nearest; scales in `kept`."""
    values, scales, *biases = mx.quantize(weight, packed.group_size, packed.bits, packed.mode)
    arrays = {"weight": values, "scales": scales}
    if packed.mode == "affine":
        arrays |= {"scales": scales.astype(kept), "biases": biases[0].astype(kept)}
    return arrays


def like(layer: nn.Module, weight: mx.array, packed: Quantization | None, kept: mx.Dtype | None = None) -> nn.Module:
    """A new layer that does what `layer` does with another weight (float32, unpacked), packed as `packed` says.

    The bias and the dtype (unless `kept` is another) stay; nothing else of `layer` is shared.
    """
    kept = kept or dtype(layer)
    arrays = pack(weight, packed, kept) if packed else {"weight": weight.astype(kept)}
    return assemble(layer, arrays, packed)


def assemble(layer: nn.Module, arrays: dict[str, mx.array], packed: Quantization | None) -> nn.Module:
    """A new layer of the kind of `layer` with other `arrays` (weight; scales and biases when packed) and its bias."""
    made = copy.copy(layer) if is_bare_router(layer) else _empty(layer, packed)
    for name in ("weight", "scales", "biases", "global_scale"):
        made.pop(name, None)
    for name, array in arrays.items():
        setattr(made, name, array)  # some are attributes of None in an empty layer, which an item would not replace
    if "bias" in layer:
        made["bias"] = layer["bias"]
    if packed is not None:
        made.freeze()
    made.train(layer.training)
    return made


def _empty(layer: nn.Module, packed: Quantization | None) -> nn.Module:
    """A small layer of the right class; its arrays are replaced at once."""
    settings: dict[str, Any] = packed.as_config() if packed else {}
    group = packed.group_size if packed else 32
    width = max(group, 32)
    if is_linear(layer):
        return nn.QuantizedLinear(width, 1, False, **settings) if packed else nn.Linear(width, 1, False)
    if is_embedding(layer):
        made = nn.QuantizedEmbedding(1, width, **settings) if packed else nn.Embedding(1, width)
        if packed:
            made.num_embeddings, made.dims = shape(layer)
        return made
    if is_half(layer):
        plain, quantized = _half_types()
        half: nn.Module = (
            quantized(width, 1, 1, packed.group_size, packed.bits, packed.mode) if packed else plain(1, 1, 1)
        )
        return half
    plain, quantized = switch_types()
    experts: nn.Module = quantized(width, 1, 1, False, **settings) if packed else plain(width, 1, 1, False)
    return experts
