"""Rotary positions as two tables, made once for a batch: on a CPU, MLX makes every sine and cosine again at each use.

Whatever its frequencies and scales, a rotation of positions is linear, and in most models it mixes number i of a head
with number i + half:

    out = x · C + swapped(x) · S        C, S [T, d]

Three probes through the model's own module give C and S, a fourth says whether that is really all it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

CHECKED = 8  # positions that the tables are checked at
ERROR = 1e-5
KEPT = 8  # tables of one batch


@dataclass(frozen=True, slots=True)
class Tables:
    """C and S of the rotation of heads, of which the first 2 · half numbers turn; and the S that turns back."""

    half: int
    own: mx.array
    others: mx.array
    back: mx.array

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return int(self.own.nbytes + self.others.nbytes + self.back.nbytes)

    def turn(self, x: mx.array) -> mx.array:
        """The rotation of x [B, heads, T, d]."""

        @mx.custom_function
        def turned(x: mx.array) -> mx.array:
            return self._mixed(x, self.others)

        @turned.vjp
        def backward(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            return self._mixed(cotangent, self.back)

        value: Any = turned(x)
        out: mx.array = value
        return out

    def _mixed(self, x: mx.array, others: mx.array) -> mx.array:
        # in memory the heads of a token stand side by side, as its projection made them and wants them back: in that
        # order all three passes run through whole rows, in the other a pass would go across and a copy would follow
        x = x.swapaxes(1, 2)
        out = x * self.own[:, None] + _swapped_product(x, others, self.half)
        return out.astype(x.dtype).swapaxes(1, 2)


def _swapped_product(x: mx.array, factors: mx.array, half: int) -> mx.array:
    """swapped(x) · factors of x [B, T, heads, d]; the swapped halves are a view that goes backwards, not a copy."""
    turning, *rest = mx.split(x, [2 * half], axis=-1) if x.shape[-1] > 2 * half else [x]
    pairs = turning.reshape(*turning.shape[:-1], 2, half)[..., ::-1, :]
    out = (pairs * factors[:, : 2 * half].reshape(-1, 1, 2, half)).reshape(turning.shape)
    return mx.concatenate([out, mx.zeros_like(rest[0])], axis=-1) if rest else out


def _swapped(x: mx.array, half: int) -> mx.array:
    first, second, rest = mx.split(x, [half, 2 * half], axis=-1)
    return mx.concatenate([second, first, rest], axis=-1)


def tables(turn: Callable[[mx.array], mx.array], length: int, width: int, half: int) -> Tables | None:
    """The tables of `turn`, which rotates [B, heads, T, width]; None if it does something else."""
    place = mx.arange(width)
    parts = [place < half, (place >= half) & (place < 2 * half), place >= 2 * half]
    probes = mx.broadcast_to(mx.stack(parts).astype(mx.float32)[None, :, None], (1, 3, length, width))
    first, second, rest = turn(probes)[0]
    nothing = mx.zeros_like(first)
    own = mx.where(parts[0], first, mx.where(parts[1], second, rest))
    others = mx.where(parts[0], second, mx.where(parts[1], first, nothing))
    found = Tables(half, own, others, mx.contiguous(_swapped(others, half)))
    x = mx.random.normal((1, 1, length, width), key=mx.random.key(0))
    error = mx.abs(found.turn(x) - turn(x))[..., :CHECKED, :].max()
    return found if float(error) <= ERROR * max(1.0, float(mx.abs(own).max())) else None
