"""Compiled functions, one for each kind of call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlxlora.engine.masks import Layout


class Traces:
    """What was compiled, by the kind of call that it serves.

    Where nothing is compiled, nothing is kept either: a function is made for each call, and may know all about it.
    """

    def __init__(self, compiled: bool) -> None:
        self.compiled = compiled
        self._known: dict[Hashable, Callable[..., Any]] = {}

    def of(self, kind: Hashable, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function for calls of this kind, which is `function` where it is the first of them."""
        if not self.compiled:
            return function
        if kind not in self._known:
            self._known[kind] = mx.compile(function)
        return self._known[kind]

    def clear(self) -> None:
        """Forget what was compiled."""
        self._known.clear()


def given(layout: Layout, key: mx.array | None) -> tuple[list[mx.array], list[mx.array]]:
    """What differs from batch to batch, as arguments of a traced function, which takes no None: segments and key."""
    return ([] if layout.segments is None else [layout.segments]), ([] if key is None else [key])


def laid_out(layout: Layout, segments: Sequence[mx.array]) -> Layout:
    """The layout inside of a traced function, with the segments that it is given."""
    return replace(layout, segments=segments[0] if segments else None)
