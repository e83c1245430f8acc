"""Compiled functions that forget shapes which did not come again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from threading import get_ident

import mlx.core as mx

SHAPES = 512  # that stay compiled


def by_shape(function: Callable[..., mx.array], most: int = SHAPES) -> Callable[..., mx.array]:
    """`function` of arrays, compiled; of the shapes that it is called with, the `most` used last stay.

    MLX keeps what it made for every shape (and in each thread) as long as what `mx.compile` returned, and looks
    through all of it at every call: rows of a thousand lengths would take tens of megabytes and half a millisecond.
    """

    @lru_cache(maxsize=most)
    def compiled(shapes: tuple[Hashable, ...], thread: int) -> Callable[..., mx.array]:
        return mx.compile(lambda *arrays: function(*arrays))

    def call(*arrays: mx.array) -> mx.array:
        return compiled(tuple([array.shape for array in arrays]), get_ident())(*arrays)

    return call
