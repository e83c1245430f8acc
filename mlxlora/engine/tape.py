"""Keeping the matrix products of a block, and only those, from its forward to its backward pass.

In the forward trace each product (a linear layer, an expert, attention) writes its result on a tape. In the backward
trace the same calls read them off again, in the same order: the value comes from the tape, the gradient is computed
from the inputs, and what lies between the products (norms, rotations, activations), cheap and large, is simply
computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import AdapterLayer
from mlxlora.engine.arguments import put_together, take_apart
from mlxlora.engine.hold import Hold, own_call, own_class
from mlxlora.engine.slots import Slots

_SWITCHES = frozenset({"SwitchLinear", "QuantizedSwitchLinear", "MultiLinear", "QuantizedMultiLinear"})


class Tape:
    """The results of a block's products, in the order of the calls."""

    def __init__(self, results: Sequence[mx.array | None] | None = None) -> None:
        """Empty, to write on; or with `results`, to read."""
        self.results: list[mx.array | None] = list(results or [])
        self.reading = results is not None
        self._next = 0

    def write(self, result: mx.array) -> mx.array:
        """Keep a result."""
        self.results.append(result)
        return result

    def read(self) -> mx.array | None:
        """The next result; None if its value is of no use: then the call is written out, and only its gradient
        computed."""
        self._next += 1
        return self.results[self._next - 1]


_tape: ContextVar[Tape | None] = ContextVar("tape", default=None)


def current() -> Tape | None:
    """The tape of the block that is being traced, if its products are kept."""
    return _tape.get()


@contextmanager
def on(tape: Tape | None) -> Iterator[None]:
    """Let the products of the block in hand use `tape`."""
    token = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(token)


def products(block: nn.Module) -> list[nn.Module]:
    """The modules of `block` whose call is a matrix product; adapters count as one with what they adapt."""
    found: list[nn.Module] = []

    def walk(value: Any) -> None:
        if isinstance(value, nn.Module) and (
            isinstance(value, (AdapterLayer, nn.Linear, nn.QuantizedLinear)) or own_class(value).__name__ in _SWITCHES
        ):
            found.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk(block)
    return found


class Products:
    """The products of one block, held so that they write to or read from the tape."""

    def __init__(self, block: nn.Module) -> None:
        self._modules = [(module, Slots(module)) for module in products(block)]

    def holding(self) -> Hold:
        """A hold under which every product uses the current tape."""
        hold = Hold()
        for module, slots in self._modules:
            hold.on(module, _taped(module, slots))
        return hold


def _taped(module: nn.Module, slots: Slots) -> Callable[..., Any]:
    inner = own_call(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        tape = _tape.get()
        if tape is None:
            return inner(*args, **kwargs)
        if not tape.reading:
            return tape.write(inner(*args, **kwargs))
        result = tape.read()
        return inner(*args, **kwargs) if result is None else _replayed(inner, slots, result, args, kwargs)

    return call


def _replayed(inner: Callable[..., Any], slots: Slots, result: mx.array, args: Any, kwargs: Any) -> mx.array:
    """`result` as the value of `inner(*args, **kwargs)`, with the gradient of that call by its inputs and weights."""
    inputs, form = take_apart((args, kwargs))
    arrays = slots.get()
    floats = [index for index, array in enumerate(inputs) if mx.issubdtype(array.dtype, mx.floating)]

    def again(*primals: mx.array) -> mx.array:
        given = list(inputs)
        for index, array in zip(floats, primals, strict=False):
            given[index] = array
        args, kwargs = put_together(given, form)
        with slots.holding(arrays), slots.holding(primals[len(floats) :], slots.trainable), on(None):
            out: mx.array = inner(*args, **kwargs)
        return out

    @mx.custom_function
    def product(*primals: mx.array) -> mx.array:
        return result

    @product.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        given = [primals] if isinstance(primals, mx.array) else list(primals)
        return tuple(mx.vjp(again, given, [cotangent])[1])

    value: Any = product(*[inputs[index] for index in floats], *[arrays[index] for index in slots.trainable])
    out: mx.array = value
    return out
