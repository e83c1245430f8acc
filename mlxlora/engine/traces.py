"""Compiled functions, one for each kind of call."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx


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
