"""Linear layers with and without LoRA, all those of one input together, with a backward pass that keeps little.

    N  tokens    x [N, in]    y = x Wᵀ + b + s · (x A) B    A [in, r]    B [r, out]    z = x A [N, r]

Of a group of layers with the same input (queries, keys and values; gate and up), the As stand side by side in one
product, and so do the gradients by them; the gradient by x is added up inside the products. Kept for the backward
pass: y, which the rest of the block needs, and z. Nothing of the base weights has a gradient.

The order of the products, by what they take: (x A) B takes r (in + out) multiplications a token, the gradient by x
through B and A as many, and those by A and B, taken from z and from what has passed B, as many again. With D = A B in
one piece each of the three takes in · out a token, and D and its parts another 4 r in · out a step. So the narrow way
is the cheaper one wherever A and B together have fewer numbers than the weight, r (in + out) < in · out: for any LoRA
that is smaller than what it adapts, of whatever length a row is. Adding D to the weight would save a third of this,
from about as many tokens on as the layer is wide: at rank 8 a hundredth of the layer's time, for a copy of each weight
in float32 (in half precision the sum would round the adapter away, and a quantized weight would have to be unpacked).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import LoRALinear, weights
from mlxlora.engine.device import on_cpu, settle, stage
from mlxlora.engine.hold import own_call, own_class


@dataclass(frozen=True)
class Member:
    """One layer of a group: its plain part, and the LoRA beside it, if there is one."""

    base: nn.Module
    lora: LoRALinear | None

    def weight(self, dtype: mx.Dtype) -> mx.array:
        """The weight as it enters a product, [out, in]."""
        if "scales" in self.base:
            return weights.dense(self.base).astype(dtype)
        weight: mx.array = self.base["weight"]
        return weight.astype(dtype)

    def forward(self, x: mx.array) -> mx.array:
        """x Wᵀ + b."""
        if not on_cpu() or ("scales" not in self.base and x.dtype == mx.float32):
            out: mx.array = own_call(self.base)(x)
            return out
        out = x @ self.weight(x.dtype).T
        return out + self.base["bias"].astype(x.dtype) if "bias" in self.base else out

    def backward(self, into: mx.array | None, cotangent: mx.array) -> mx.array:
        """into + cotangent W."""
        if "scales" in self.base and not on_cpu():
            blank = mx.zeros((*cotangent.shape[:-1], weights.shape(self.base)[-1]), cotangent.dtype)
            grad = mx.vjp(own_call(self.base), [blank], [cotangent])[1][0]
            return grad if into is None else into + grad
        weight = self.weight(cotangent.dtype)
        return cotangent @ weight if into is None else mx.addmm(into, cotangent, weight)


def member(module: nn.Module) -> Member | None:
    """The module as a member of a group; None if it is of another kind or its base learns."""
    lora = module if own_class(module) is LoRALinear else None
    base = module.linear if isinstance(module, LoRALinear) else module
    if isinstance(module, nn.Module) and weights.is_linear(base) and not base.trainable_parameters():
        return Member(base, lora if isinstance(lora, LoRALinear) else None) if base is module or lora else None
    return None


class Group:
    """Layers that are called with one input."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._adapted = [index for index, one in enumerate(members) if one.lora is not None]

    def __len__(self) -> int:
        return len(self._members)

    def learned(self) -> list[mx.array]:
        """A and B of each adapted member, as they are now."""
        return [array for index in self._adapted for array in (self._lora(index).lora_a, self._lora(index).lora_b)]

    def forward(self, x: mx.array) -> tuple[list[mx.array], list[mx.array]]:
        """The outputs of all members for `x`, and z of the adapted ones."""
        flat, shape = _flat(x)
        zs = self._down(flat, self.learned())
        outs = []
        rest = iter(zs)
        for one in self._members:
            y = one.forward(flat)
            if one.lora is not None:
                y = mx.addmm(y, next(rest), one.lora.scale * one.lora.lora_b.astype(flat.dtype))
            outs.append(y.astype(x.dtype).reshape(*shape, y.shape[-1]))
        return outs, zs

    def replayed(self, x: mx.array, outs: Sequence[mx.array | None], zs: Sequence[mx.array]) -> list[mx.array]:
        """`outs`, known from an earlier pass, as differentiable results of `forward(x)`.

        Where an output is None, nobody asks for its value.
        """
        blank = mx.zeros((), x.dtype)
        values = [
            given if given is not None else mx.broadcast_to(blank, (*x.shape[:-1], weights.shape(one.base)[-2]))
            for given, one in zip(outs, self._members, strict=True)
        ]

        @mx.custom_function
        def products(*primals: mx.array) -> list[mx.array]:
            return values

        @products.vjp
        def backward(primals: Any, cotangents: Any, _: Any) -> Any:
            x, *learned = [primals] if isinstance(primals, mx.array) else primals
            slopes = [cotangents] if isinstance(cotangents, mx.array) else list(cotangents)
            return tuple(self._backward(x, learned, zs, slopes))

        found: Any = products(stage(x), *self.learned())
        return [found] if isinstance(found, mx.array) else list(found)

    def _lora(self, index: int) -> LoRALinear:
        lora = self._members[index].lora
        assert lora is not None
        return lora

    def _drops(self) -> bool:
        return any(self._lora(index)._dropout_key is not None and self._lora(index).dropout for index in self._adapted)

    def _down(self, flat: mx.array, learned: Sequence[mx.array]) -> list[mx.array]:
        factors = [a.astype(flat.dtype) for a in learned[::2]]
        if not factors:
            return []
        if self._drops():
            return [self._lora(index).drop(flat) @ a for index, a in zip(self._adapted, factors, strict=True)]
        return _split(flat @ _beside(factors), factors)

    def _backward(
        self, x: mx.array, learned: Sequence[mx.array], zs: Sequence[mx.array], slopes: Sequence[mx.array]
    ) -> list[mx.array]:
        settle(x)
        flat, shape = _flat(x)
        slopes = [_flat(slope)[0] for slope in slopes]
        factors = [a.astype(flat.dtype) for a in learned[::2]]
        narrow, grads_b = [], []
        for index, z, b in zip(self._adapted, zs, learned[1::2], strict=True):
            scale, slope = self._lora(index).scale, slopes[index]
            narrow.append(slope @ (scale * b.astype(flat.dtype)).T)
            grads_b.append(((scale * z).T @ slope).astype(b.dtype))
        total: mx.array | None = None
        grads_a: list[mx.array] = []
        if factors and self._drops():
            for index, slope, a in zip(self._adapted, narrow, factors, strict=True):
                lora = self._lora(index)
                grads_a.append(lora.drop(flat).T @ slope)
                part = mx.vjp(lora.drop, [flat], [slope @ a.T])[1][0]
                total = part if total is None else total + part
        elif factors:
            together = _beside(narrow)
            grads_a = _split(flat.T @ together, factors)
            total = together @ _beside(factors).T
        settle(*grads_a, *grads_b)
        for one, slope in zip(self._members, slopes, strict=True):
            total = one.backward(total, slope)
        assert total is not None
        pairs = zip(grads_a, grads_b, learned[::2], strict=True)
        found = [array for a, b, like in pairs for array in (a.astype(like.dtype), b)]
        return [total.astype(x.dtype).reshape(*shape, total.shape[-1]), *found]


def _flat(x: mx.array) -> tuple[mx.array, tuple[int, ...]]:
    """[…, in] → [N, in], in the dtype that products are made in (float32 on a CPU)."""
    flat = x.reshape(-1, x.shape[-1])
    return (flat.astype(mx.float32) if on_cpu() else flat), x.shape[:-1]


def _beside(factors: Sequence[mx.array]) -> mx.array:
    return factors[0] if len(factors) == 1 else mx.concatenate(list(factors), axis=-1)


def _split(joined: mx.array, factors: Sequence[mx.array]) -> list[mx.array]:
    if len(factors) == 1:
        return [joined]
    ends = [sum(a.shape[-1] for a in factors[: index + 1]) for index in range(len(factors) - 1)]
    return list(mx.split(joined, ends, axis=-1))
