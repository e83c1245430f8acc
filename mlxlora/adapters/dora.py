"""DoRA (https://arxiv.org/abs/2402.09353): a LoRA whose rows keep a length that is learned by itself.

    V = W + scale · B A          y = m / ‖V‖ · (V x) + bias

‖V‖ is the length of each row and counts as a constant in the gradient, as in the paper, PEFT and mlx-lm. It is found
without forming V: ‖w + s·bA‖² = ‖w‖² + 2s·(wAᵀ)·b + s²·b(AAᵀ)bᵀ, row by row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import weights
from mlxlora.adapters.config import LayerConfig
from mlxlora.adapters.heads import Role, part
from mlxlora.adapters.lora import LoRA, LoRAEmbedding, LoRAHeads, LoRALinear, LoRAMatrix


class DoRA(LoRA):
    """What the kinds of DoRA share: a magnitude `m` for each row, float32, that starts as the row's own length."""

    learned = ("lora_a", "lora_b", "m")
    m: mx.array
    _squares: mx.array

    def __init__(self, layer: nn.Module, config: LayerConfig) -> None:
        super().__init__(layer, config)
        _hold_squares(self)

    @abstractmethod
    def magnitude(self) -> mx.array:
        """m / ‖V‖: what each row is multiplied with, float32."""

    def adapted(self) -> mx.array:
        return _restored(self.m, super().adapted())

    def changes(self) -> bool:
        return super().changes() or not mx.array_equal(self.m, mx.sqrt(self._squares)).item()


class DoRAMatrix(DoRA, LoRAMatrix):
    """DoRA on one matrix. `m` is float32 [out]."""

    def start(self, key: mx.array) -> None:
        LoRAMatrix.start(self, key)
        self.m = mx.sqrt(self._squares)

    def magnitude(self) -> mx.array:
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        cross = weights.matmul(self.base, a.T.astype(weights.dtype(self.base)))
        return self.m / _lengths(self._squares, cross.astype(mx.float32).T, a.T @ a, b.T, self.scale)


class DoRALinear(DoRAMatrix, LoRALinear):
    """DoRA on `nn.Linear` and `nn.QuantizedLinear`."""

    def effect(self, x: mx.array, y: mx.array, *arguments: Any) -> mx.array:
        """What the adapter adds to `y`, the output of the base for `x`; the argument may be a `magnitude()` kept."""
        bare = y - self.linear["bias"] if "bias" in self.linear else y
        factor = (arguments[0] if arguments else self.magnitude()).astype(y.dtype)
        return factor * (bare + super().effect(x, y)) - bare

    def __call__(self, x: mx.array) -> mx.array:
        y = weights.matmul(self.linear, x)
        y = self.magnitude().astype(y.dtype) * (y + LoRALinear.effect(self, x, y))
        return y + self.linear["bias"] if "bias" in self.linear else y


class DoRAHeads(DoRAMatrix, LoRAHeads):
    """DoRA on the `kv_b_proj` of multi-head latent attention: a magnitude for each row of that one matrix."""

    def effect(self, x: mx.array, y: mx.array, *arguments: Any) -> mx.array:
        """What the adapter adds to `y`, the output of a half for `x`.

        The arguments are the half's role, what it does without an adapter, and perhaps a `magnitude()` kept.
        """
        role, base, *kept = arguments
        return self._rows(role, base, x, kept[0] if kept else self.magnitude()) - y

    def call(self, role: Role, base: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        return self._rows(role, base, x, self.magnitude())

    def _rows(self, role: Role, base: Callable[[mx.array], mx.array], x: mx.array, magnitude: mx.array) -> mx.array:
        factor = part(magnitude, self.base, role)[:, None]
        if role == "queries":  # here the rows are what is summed over
            x = factor.astype(x.dtype) * x
        y = base(x)
        y = y + LoRAHeads.effect(self, x, y, role)
        return y if role == "queries" else factor.astype(y.dtype) * y


class DoRAEmbedding(DoRA, LoRAEmbedding):
    """DoRA on a table of embeddings (and the head tied to it): a magnitude for each token, `m` float32 [V]."""

    def start(self, key: mx.array) -> None:
        LoRAEmbedding.start(self, key)
        self.m = mx.sqrt(self._squares)

    def magnitude(self) -> mx.array:
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b)
        cross = self.embedding.as_linear(b.astype(weights.dtype(self.embedding)))
        return self.m / _lengths(self._squares, cross.astype(mx.float32).T, b @ b.T, a, self.scale)

    def effect(self, x: mx.array, y: mx.array, *arguments: Any) -> mx.array:
        """What the adapter adds to `y`, the embeddings of `x`; the argument may be a `magnitude()` kept."""
        factor = (arguments[0] if arguments else self.magnitude())[x][..., None].astype(y.dtype)
        return factor * (y + super().effect(x, y)) - y

    def effect_as_linear(self, x: mx.array, y: mx.array, *arguments: Any) -> mx.array:
        factor = (arguments[0] if arguments else self.magnitude()).astype(y.dtype)
        return factor * (y + super().effect_as_linear(x, y)) - y

    def __call__(self, tokens: mx.array) -> mx.array:
        y: mx.array = self.embedding(tokens)
        factor = self.magnitude()[tokens][..., None].astype(y.dtype)
        return factor * (y + LoRAEmbedding.effect(self, tokens, y))

    def as_linear(self, x: mx.array) -> mx.array:
        """The tied head: scores for every token."""
        y: mx.array = self.embedding.as_linear(x)
        return self.magnitude().astype(y.dtype) * (y + LoRAEmbedding.effect_as_linear(self, x, y))


def _hold_squares(layer: Any) -> None:
    """Keep the squared length of the base's rows: it never changes, and it is no parameter."""
    squares = mx.sum(mx.square(weights.dense(layer.base)), axis=-1)
    mx.eval(squares)
    object.__setattr__(layer, "_squares", squares)


def _lengths(squares: mx.array, cross: mx.array, gram: mx.array, rows: mx.array, scale: float) -> mx.array:
    """‖w + s·b A‖ for each row: squares [R], cross = W Aᵀ [R, r], gram = A Aᵀ [r, r], rows = b [R, r]."""
    mixed = mx.sum(rows * (2 * scale * cross + scale * scale * (rows @ gram)), axis=-1)
    return mx.sqrt(mx.maximum(squares + mixed, 1e-30))


def _restored(m: mx.array, rows: mx.array) -> mx.array:
    """Rows with the lengths `m`."""
    return rows * (m / mx.maximum(mx.linalg.norm(rows, axis=-1), 1e-15))[..., None]
