"""LoRA (https://arxiv.org/abs/2106.09685): W x + scale · B A x with small A and B, for each kind of layer.

    in, out  widths of the layer        r  rank        E  experts        V  vocabulary

    linear      lora_a [in, r]      lora_b [r, out]
    experts     lora_a [E, r, in]   lora_b [E, out, r]
    embedding   lora_a [V, r]       lora_b [r, out]
    MLA's kv_b  as a linear layer   (heads.py says of which widths)

These are the layouts of mlx-lm's adapter files.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxlora.adapters import weights
from mlxlora.adapters.heads import Role, Whole, part
from mlxlora.adapters.layer import AdapterLayer, kaiming


class LoRA(AdapterLayer):
    """What is common to LoRA on all kinds of layers: two factors whose product starts at zero."""

    lora_a: mx.array
    lora_b: mx.array

    @abstractmethod
    def product(self) -> mx.array:
        """The product of the factors in the shape of the base weight, without the scale."""

    def adapted(self) -> mx.array:
        return weights.dense(self.base) + self.scale * self.product()

    def changes(self) -> bool:
        return self.scale != 0 and bool(mx.any(self.lora_a != 0).item()) and bool(mx.any(self.lora_b != 0).item())


class LoRAMatrix(LoRA):
    """LoRA on one matrix: `lora_a` [in, r], `lora_b` [r, out]."""

    def start(self, key: mx.array) -> None:
        self.lora_a = kaiming(key, (self.input_dims, self.rank), self.input_dims)
        self.lora_b = mx.zeros((self.rank, self.output_dims))

    def product(self) -> mx.array:
        return self.lora_b.T @ self.lora_a.T


class LoRALinear(LoRAMatrix):
    """LoRA on `nn.Linear` and `nn.QuantizedLinear` (any number of bits, any mode).

    y = base(x) + scale · (drop(x) A) B
    """

    linear: Any

    def effect(self, x: mx.array, y: mx.array, *arguments: Any) -> mx.array:
        """What the adapter adds to `y`, the output of the base for `x`."""
        z = self.drop(x) @ self.lora_a.astype(x.dtype)
        return ((self.scale * z) @ self.lora_b.astype(x.dtype)).astype(y.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)
        return y + self.effect(x, y)


class LoRAHeads(LoRAMatrix, Whole):
    """LoRA on the `kv_b_proj` of multi-head latent attention, which mlx-lm splits by heads, keys and values.

    keys, values    y = base(x) + scale · (drop(x) A) B
    queries         y = base(x) + scale · (x B) Aᵀ; without dropout: what would be dropped is not seen there

    with the part of B that belongs to the heads' keys (keys, queries) or values. A layer asks for queries where a
    single token is computed, so that keys of the past need not be made.
    """

    def effect(self, x: mx.array, y: mx.array, *arguments: Any) -> mx.array:
        """What the adapter adds to `y`, the output of a half for `x`; the argument is the half's role."""
        role: Role = arguments[0]
        a = self.lora_a.astype(x.dtype)
        b = part(self.scale * self.lora_b, self.base, role).astype(x.dtype)
        added = (x @ b.swapaxes(-1, -2)) @ a.T if role == "queries" else (self.drop(x) @ a) @ b
        return added.astype(y.dtype)

    def call(self, role: Role, base: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        y = base(x)
        return y + self.effect(x, y, role)


class LoRARouter(LoRAMatrix):
    """LoRA on a router of experts that holds its matrix itself: it computes with the changed one.

    The change is as small as the matrix (a row an expert), and what comes out are choices, to which nothing can be
    added. Without dropout: PEFT has none on such a bare matrix.
    """

    linear: Any

    def __call__(self, x: mx.array) -> Any:
        return with_weight(self.linear, self.adapted(), x)


def with_weight(router: Any, weight: mx.array, x: mx.array) -> Any:
    """What a router of experts makes of `x` with another weight (float32)."""
    own: mx.array = router["weight"]
    router["weight"] = weight.astype(own.dtype)
    try:
        return router(x)
    finally:
        router["weight"] = own


class LoRASwitchLinear(LoRA):
    """LoRA on the stacked experts of a mixture (mlx-lm's `SwitchLinear`, plain or packed): a pair of factors each."""

    linear: Any

    def start(self, key: mx.array) -> None:
        experts = weights.shape(self.linear)[0]
        self.lora_a = kaiming(key, (experts, self.rank, self.input_dims), self.input_dims)
        self.lora_b = mx.zeros((experts, self.output_dims, self.rank))

    def product(self) -> mx.array:
        return self.lora_b @ self.lora_a

    def effect(self, x: mx.array, y: mx.array, *arguments: Any) -> mx.array:
        """What the adapters of the chosen experts add to `y`; the arguments are those of the layer's call after `x`."""
        indices, sorted_indices = arguments
        # MLX's CPU backend gathers products in float32 alone
        dtype = x.dtype if mx.default_device() == mx.gpu else mx.float32
        a = self.lora_a.astype(dtype).swapaxes(-1, -2)
        b = self.lora_b.astype(dtype).swapaxes(-1, -2)
        z = mx.gather_mm(self.drop(x).astype(dtype), a, rhs_indices=indices, sorted_indices=sorted_indices)
        z = mx.gather_mm(self.scale * z, b, rhs_indices=indices, sorted_indices=sorted_indices)
        return z.astype(y.dtype)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y: mx.array = self.linear(x, indices, sorted_indices=sorted_indices)
        return y + self.effect(x, y, indices, sorted_indices)


class LoRAEmbedding(LoRA):
    """LoRA on a table of embeddings, and on the head where that is tied to it (`as_linear`).

    Where the head is tied, both change together. The start is the other way round than for a linear layer (A is zero):
    only rows of tokens that were seen move.
    """

    base_name = "embedding"
    embedding: Any

    def start(self, key: mx.array) -> None:
        self.lora_a = mx.zeros((self.input_dims, self.rank))
        self.lora_b = kaiming(key, (self.rank, self.output_dims), self.output_dims)

    def product(self) -> mx.array:
        return self.lora_a @ self.lora_b

    def effect(self, x: mx.array, y: mx.array, *arguments: Any) -> mx.array:
        """What the adapter adds to `y`, the embeddings of the tokens `x`."""
        z = self.drop(self.lora_a[x].astype(y.dtype))
        return (self.scale * z) @ self.lora_b.astype(y.dtype)

    def effect_as_linear(self, x: mx.array, y: mx.array, *arguments: Any) -> mx.array:
        """What the adapter adds to `y`, the scores of the tied head for `x`."""
        z = self.drop(x) @ self.lora_b.T.astype(x.dtype)
        return ((self.scale * z) @ self.lora_a.T.astype(x.dtype)).astype(y.dtype)

    def __call__(self, tokens: mx.array) -> mx.array:
        y: mx.array = self.embedding(tokens)
        return y + self.effect(tokens, y)

    def as_linear(self, x: mx.array) -> mx.array:
        """The tied head: scores for every token."""
        y: mx.array = self.embedding.as_linear(x)
        return y + self.effect_as_linear(x, y)
