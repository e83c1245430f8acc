"""The things that mlx-lm's `sanitize()` does to a checkpoint's tensors, undone: one rule each.

A rule takes the MLX tensors that it fits and gives the checkpoint's, in place and lazily. checkpoint_layout.py says
which architecture needs which.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from mlxlora_convert.names import fit

Tensors = dict[str, mx.array]
Config = dict[str, Any]


class Rule(Protocol):
    """One thing that `sanitize()` does, undone."""

    def apply(self, tensors: Tensors, config: Config) -> None:
        """Replace the MLX tensors that this rule fits by those of the checkpoint, in place and lazily."""


def take(tensors: Tensors, pattern: str) -> Iterator[tuple[mx.array, dict[str, str]]]:
    """Every tensor whose name fits `pattern`, out of `tensors`, with what the placeholders stand for."""
    for name in list(tensors):
        if (found := fit(pattern, name)) is not None:
            yield tensors.pop(name), found


@dataclass(frozen=True, slots=True)
class Rename:
    """The same tensor under another name."""

    mlx: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for tensor, found in take(tensors, self.mlx):
            tensors[self.hf.format(**found)] = tensor


@dataclass(frozen=True, slots=True)
class Transpose:
    """A projection that the checkpoint stores [in, out]; the name stays."""

    mlx: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for tensor, found in take(tensors, self.mlx):
            tensors[self.mlx.format(**found)] = mx.contiguous(tensor.T)


@dataclass(frozen=True, slots=True)
class Convolution:
    """A depthwise convolution [channels, width, 1] that the checkpoint stores [channels, 1, width]; the name stays."""

    mlx: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for tensor, found in take(tensors, self.mlx):
            tensors[self.mlx.format(**found)] = mx.contiguous(tensor.swapaxes(1, 2))


@dataclass(frozen=True, slots=True)
class AsVector:
    """A single number that the checkpoint stores as a vector of one; the name stays."""

    mlx: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for tensor, found in take(tensors, self.mlx):
            tensors[self.mlx.format(**found)] = tensor.reshape(1)


@dataclass(frozen=True, slots=True)
class LessOne:
    """The weight of a norm that the checkpoint stores minus one; the name stays.

    No number is lost where the sum came from such a checkpoint; elsewhere the proof refuses the model.
    """

    mlx: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for tensor, found in take(tensors, self.mlx):
            tensors[self.mlx.format(**found)] = tensor - 1.0


@dataclass(frozen=True, slots=True)
class Unstack:
    """Stacked experts [experts, …], one tensor each in the checkpoint; `{e}` is the expert's number."""

    mlx: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for stack, found in take(tensors, self.mlx):
            for number in range(stack.shape[0]):
                tensors[self.hf.format(**found, e=number)] = stack[number]


@dataclass(frozen=True, slots=True)
class JoinHeads:
    """Multi-head latent attention: keys [heads, rank, nope] and values [heads, v, rank] are one matrix `kv_b_proj`."""

    keys: str
    values: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for keys, found in take(tensors, self.keys):
            values = tensors.pop(self.values.format(**found))
            both = mx.concatenate([keys.swapaxes(-1, -2), values], axis=1)
            tensors[self.hf.format(**found)] = both.reshape(-1, both.shape[-1])


@dataclass(frozen=True, slots=True)
class Interleave:
    """Gate and up projections of stacked experts, row by row in turn, transposed where they are matrices."""

    gate: str
    up: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for gate, found in take(tensors, self.gate):
            up = tensors.pop(self.up.format(**found))
            both = mx.stack([gate, up], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])
            tensors[self.hf.format(**found)] = both.swapaxes(-1, -2) if both.ndim == 3 else both


@dataclass(frozen=True, slots=True)
class StackHalves:
    """Gate and up projections, one after the other in one matrix (for each expert, where they are stacked)."""

    gate: str
    up: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for gate, found in take(tensors, self.gate):
            up = tensors.pop(self.up.format(**found))
            tensors[self.hf.format(**found)] = mx.concatenate([gate, up], axis=-2)


@dataclass(frozen=True, slots=True)
class WithoutBias:
    """A router whose checkpoint has a bias [1, experts] beside it, which mlx-lm leaves out: zeros do nothing."""

    router: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for name, router in list(tensors.items()):
            if (found := fit(self.router, name)) is not None:
                tensors[self.hf.format(**found)] = mx.zeros((1, router.shape[0]), dtype=mx.float32)


@dataclass(frozen=True, slots=True)
class TransposedExperts:
    """Stacked experts that the checkpoint stores [experts, in, out] under another name."""

    mlx: str
    hf: str

    def apply(self, tensors: Tensors, config: Config) -> None:
        for stack, found in take(tensors, self.mlx):
            tensors[self.hf.format(**found)] = stack.swapaxes(-1, -2)
