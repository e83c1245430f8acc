"""Arguments of a call, taken apart into arrays and the rest, so that the arrays can pass through a traced function."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import mlx.core as mx

from mlxlora.data.sample import Batch


class _Array:
    """Stands where an array stood; all are equal, so that two calls of one form compare equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Array)

    def __hash__(self) -> int:
        return 0


ARRAY = _Array()


# An inner function that calls itself would be a cycle of references, and what it saw would live until Python next looks
# for cycles: whole blocks' worth of arrays. Hence functions of the module.
def take_apart(value: Any) -> tuple[list[mx.array], Any]:
    """The arrays in `value` (nested tuples, lists and dicts), and `value` with a mark for each."""
    arrays: list[mx.array] = []
    return arrays, _taken_out(value, arrays)


def _taken_out(value: Any, arrays: list[mx.array]) -> Any:
    if isinstance(value, mx.array):
        arrays.append(value)
        return ARRAY
    if type(value) in (tuple, list):
        return type(value)(_taken_out(item, arrays) for item in value)
    if type(value) is dict:
        return {key: _taken_out(item, arrays) for key, item in value.items()}
    return value


def put_together(arrays: Sequence[mx.array], form: Any) -> Any:
    """The inverse of `take_apart`."""
    return _put_in(form, iter(arrays))


def _put_in(value: Any, rest: Iterator[mx.array]) -> Any:
    if value is ARRAY:
        return next(rest)
    if type(value) in (tuple, list):
        return type(value)(_put_in(item, rest) for item in value)
    if type(value) is dict:
        return {key: _put_in(item, rest) for key, item in value.items()}
    return value


class BatchForm:
    """A batch without its arrays: what stays the same over the batches of a run, so that one trace serves them."""

    def __init__(self, batch: Batch) -> None:
        assert is_dataclass(batch)
        self._names = [field.name for field in fields(batch) if isinstance(getattr(batch, field.name), mx.array)]
        blank: dict[str, Any] = {"samples": (), **dict.fromkeys(self._names)}
        self._batch = replace(batch, **blank)
        rest = [(field.name, getattr(self._batch, field.name)) for field in fields(batch)]
        self.key = (type(batch), tuple(self._names), tuple((name, value) for name, value in rest if value is not None))

    def arrays(self, batch: Batch) -> list[mx.array]:
        """The arrays of a batch of this form."""
        return [getattr(batch, name) for name in self._names]

    def batch(self, arrays: Sequence[mx.array]) -> Batch:
        """A batch of this form with other arrays (and without sample numbers)."""
        named: dict[str, Any] = dict(zip(self._names, arrays, strict=True))
        return replace(self._batch, **named)
