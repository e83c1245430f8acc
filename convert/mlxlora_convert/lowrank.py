"""An adapter as numbers, whatever program it comes from or goes to: for each module a product of two thin matrices.

in   width of a layer's input        out  width of its output       r  rank
V    tokens of an embedding          D    its width                  E  experts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx

Kind = Literal["linear", "embedding", "experts"]


@dataclass(frozen=True, slots=True)
class Place:
    """A module of the base model that can carry an adapter: what it is, and the shape of its unpacked weight.

    linear [out, in], embedding [V, D], experts [E, out, in]
    """

    kind: Kind
    shape: tuple[int, ...]

    def factors(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes that `a` and `b` of this rank have here."""
        if self.kind == "linear":
            out, in_ = self.shape
            return (in_, rank), (rank, out)
        if self.kind == "embedding":
            tokens, width = self.shape
            return (tokens, rank), (rank, width)
        experts, out, in_ = self.shape
        return (experts, rank, in_), (experts, out, rank)


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to one module, in MLX's layout.

    linear:    a [in, r], b [r, out];       the weight [out, in] grows by scale · (a b)ᵀ
    embedding: a [V, r],  b [r, D];         the table [V, D] grows by scale · a b
    experts:   a [E, r, in], b [E, out, r]; each weight [out, in] grows by scale · b a
    magnitude: [out], DoRA's learned length of each row of the grown weight, else None
    """

    kind: Kind
    a: mx.array
    b: mx.array
    scale: float
    magnitude: mx.array | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[1] if self.kind == "experts" else self.a.shape[-1])

    def delta(self) -> mx.array:
        """What the weight grows by, in the weight's own shape (without DoRA's magnitude)."""
        if self.kind == "linear":
            return self.scale * (self.a @ self.b).T
        if self.kind == "embedding":
            return self.scale * (self.a @ self.b)
        return self.scale * (self.b @ self.a)

    def scaled(self, factor: float) -> LowRank:
        """The same adapter, `factor` times as strong."""
        return self if factor == 1 else replace(self, scale=self.scale * factor)

    def with_scale(self, scale: float) -> LowRank:
        """The same numbers under another scale: the difference is folded into `b`."""
        return self if scale == self.scale else replace(self, b=self.b * (self.scale / scale), scale=scale)

    def with_rank(self, rank: int) -> LowRank:
        """The same numbers at a higher rank: padded with zeros, which add nothing."""
        more = rank - self.rank
        if more <= 0:
            return self
        axis_a, axis_b = (1, 2) if self.kind == "experts" else (1, 0)
        return replace(self, a=_padded(self.a, axis_a, more), b=_padded(self.b, axis_b, more))


Adapter = Mapping[str, LowRank]
"""What an adapter adds, by MLX module path."""


def _padded(array: mx.array, axis: int, more: int) -> mx.array:
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, more)
    return mx.pad(array, widths)


def concatenated(parts: list[LowRank]) -> LowRank:
    """The sum of several products on one module as one product: the ranks add up."""
    common = parts[0].scale or 1.0
    same = [part.with_scale(common) for part in parts]
    first = same[0]
    axis_a, axis_b = (1, 2) if first.kind == "experts" else (1, 0)
    return replace(
        first,
        a=mx.concatenate([part.a for part in same], axis=axis_a),
        b=mx.concatenate([part.b for part in same], axis=axis_b),
    )
