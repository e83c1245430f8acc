"""Keeping the matrix products of a block, and only those, from its forward to its backward pass.

In the forward trace each product (a linear layer, an expert, attention) writes its results on a tape. In the backward
trace the same calls read them off again, in the same order: the value comes from the tape, the gradient is computed
from the inputs, and what lies between the products (norms, rotations, activations), cheap and large, is simply
computed again. `products.py` has the layers do so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar

import mlx.core as mx

from mlxlora.engine.device import settle

Site = tuple[object, int]  # who wrote it, and which of its results it is


class Tape:
    """The results of a block's products, in the order of the calls."""

    def __init__(
        self,
        results: Sequence[mx.array] | None = None,
        unread: AbstractSet[Site] = frozenset(),
        keeps: bool = True,
        alone: bool = False,
    ) -> None:
        """Empty, to write on; or with `results`, to read.

        Results of the sites in `unread` are not kept (or none, without `keeps`). `alone`: nothing else of the block is
        asked for.
        """
        self.results: list[mx.array] = list(results or [])
        self.sites: list[Site] = []
        self.reading = results is not None
        self._unread, self._keeps, self._alone = unread, keeps, alone
        self._next = 0
        self._values: dict[int, tuple[mx.array, mx.array]] = {}

    def write(self, who: object, *results: mx.array) -> None:
        """Keep the results of a call."""
        for number, result in enumerate(results):
            if self._keeps and (who, number) not in self._unread:
                self.results.append(result)
                self.sites.append((who, number))

    def settle(self, who: object, *results: mx.array) -> None:
        """Compute the results of a call now (see `device.settle`), if anybody asks for them."""
        for number, result in enumerate(results):
            if not (self._alone and (who, number) in self._unread):
                settle(result)

    def read(self, who: object, count: int) -> list[mx.array | None]:
        """The next results; None for one whose value nobody asks for."""
        found: list[mx.array | None] = []
        for number in range(count):
            if (who, number) in self._unread:
                found.append(None)
            else:
                found.append(self.results[self._next])
                self._next += 1
        return found

    def note(self, traced: mx.array, value: mx.array) -> None:
        """`traced`, which MLX follows, has this `value`."""
        self._values[id(traced)] = (traced, value)

    def value(self, traced: mx.array) -> mx.array | None:
        """The value of a product that MLX follows, as it was read."""
        return self._values.get(id(traced), (None, None))[1]


_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)


def current() -> Tape | None:
    """The tape of the block that is being traced, if its products are kept."""
    return _tape.get()


def values(*arrays: mx.array) -> list[mx.array] | None:
    """The values of products that are followed for their gradient; None if one of `arrays` is something else."""
    tape = _tape.get()
    found = [] if tape is None else [value for array in arrays if (value := tape.value(array)) is not None]
    return found if len(found) == len(arrays) else None


@contextmanager
def on(tape: Tape | None) -> Iterator[None]:
    """Let the products of the block in hand use `tape`."""
    token = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(token)
