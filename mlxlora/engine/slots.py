"""Every array of a module tree as a flat list, to pass in and out of traced functions.

`nn.Module.parameters()` leaves out private arrays (rope frequencies, for one). A function that is compiled once and
used for all blocks of one structure must see those as inputs too, so the slots hold everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.parameters import flat


class Slots:
    """The places of all arrays below `root`, in a fixed order, without those below the modules in `without`."""

    def __init__(self, root: nn.Module, without: Sequence[nn.Module] = ()) -> None:
        self.paths: list[str] = []
        self._places: list[tuple[Any, Any]] = []
        self._walk(root, "", {id(module) for module in without}, set())
        self._trainable(root)

    def _walk(self, value: Any, path: str, skip: set[int], seen: set[int]) -> None:
        if isinstance(value, (dict, list)):
            if id(value) in skip or id(value) in seen:
                return
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, child in items:
                where = f"{path}.{key}" if path else str(key)
                if isinstance(child, mx.array):
                    self.paths.append(where)
                    self._places.append((value, key))
                else:
                    self._walk(child, where, skip, seen)
        elif isinstance(value, tuple):
            for key, child in enumerate(value):
                self._walk(child, f"{path}.{key}", skip, seen)

    def _trainable(self, root: nn.Module) -> None:
        learned = flat(root.trainable_parameters())
        self.trainable = [index for index, path in enumerate(self.paths) if path in learned]

    def __len__(self) -> int:
        return len(self.paths)

    def get(self) -> list[mx.array]:
        """The arrays as they are now."""
        return [container[key] for container, key in self._places]

    def put(self, arrays: Sequence[mx.array], indices: Sequence[int] | None = None) -> None:
        """Set all arrays, or those at `indices`."""
        places = self._places if indices is None else [self._places[index] for index in indices]
        for (container, key), array in zip(places, arrays, strict=True):
            container[key] = array

    @contextmanager
    def holding(self, arrays: Sequence[mx.array], indices: Sequence[int] | None = None) -> Iterator[None]:
        """`arrays` in the slots for as long as the block runs; then what stood there before."""
        before = self.get()
        self.put(arrays, indices)
        try:
            yield
        finally:
            self.put(before)
