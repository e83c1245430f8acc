"""Keeping the matrix products of a block, and only those, from its forward to its backward pass.

In the forward trace each product (a linear layer, an expert, attention) writes its results on a tape. In the backward
trace the same calls read them off again, in the same order: the value comes from the tape, the gradient is computed
from the inputs, and what lies between the products (norms, rotations, activations), cheap and large, is simply
computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import AdapterLayer
from mlxlora.adapters.heads import Whole
from mlxlora.adapters.lora import LoRARouter
from mlxlora.engine.arguments import put_together, take_apart
from mlxlora.engine.device import settle
from mlxlora.engine.hold import Hold, own_call, own_class
from mlxlora.engine.linear import Group, member
from mlxlora.engine.slots import Slots

_SWITCHES = frozenset({"SwitchLinear", "QuantizedSwitchLinear", "MultiLinear", "QuantizedMultiLinear"})


Site = tuple[object, int]  # who wrote it, and which of its results it is


class Tape:
    """The results of a block's products, in the order of the calls."""

    def __init__(
        self,
        results: Sequence[mx.array] | None = None,
        unread: AbstractSet[Site] = frozenset(),
        keeps: bool = True,
    ) -> None:
        """Empty, to write on; or with `results`, to read. Results of the sites in `unread` are not kept (or none)."""
        self.results: list[mx.array] = list(results or [])
        self.sites: list[Site] = []
        self.reading = results is not None
        self._unread, self._keeps = unread, keeps
        self._next = 0
        self._values: dict[int, tuple[mx.array, mx.array]] = {}

    def write(self, who: object, *results: mx.array) -> None:
        """Keep the results of a call."""
        for number, result in enumerate(results):
            if self._keeps and (who, number) not in self._unread:
                self.results.append(result)
                self.sites.append((who, number))

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


def products(block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules of `block` whose call is a matrix product (adapters count as one with what they adapt); its norms."""
    found: list[nn.Module] = []
    norms: list[nn.Module] = []

    def walk(value: Any) -> None:
        if isinstance(value, (LoRARouter, Whole)):
            return  # small, and no array comes out; what is called of the other are its halves
        if isinstance(value, nn.Module) and (
            isinstance(value, (AdapterLayer, nn.Linear, nn.QuantizedLinear)) or own_class(value).__name__ in _SWITCHES
        ):
            found.append(value)
        elif isinstance(value, (nn.RMSNorm, nn.LayerNorm)):
            norms.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk(block)
    return found, norms


@mx.custom_function
def _stage(x: mx.array) -> mx.array:
    """`x`; in the backward pass, what comes back to here is settled before it goes on."""
    return x


@_stage.vjp
def _stage_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
    settle(cotangent)
    return cotangent


def _staged(module: nn.Module) -> Callable[..., Any]:
    """A norm that parts the backward pass: its gradient is made of many arrays, and so is that of a rotation."""
    inner = own_call(module)

    def call(x: mx.array) -> Any:
        tape = _tape.get()
        out = inner(x)
        if tape is None or not tape.reading:
            return out
        settle(out)
        return _stage(out)

    return call


class Products:
    """The products of one block, held so that they write to or read from the tape.

    Which layers share an input is seen in the first pass; in it, each is a group of its own.
    """

    def __init__(self, block: nn.Module) -> None:
        self._modules, self._norms = products(block)
        self._numbers = {id(module): number for number, module in enumerate(self._modules)}
        self._slots = {id(module): Slots(module) for module in self._modules}
        self._called: list[tuple[nn.Module, mx.array]] = []
        self._looking = False
        self._group_of: dict[int, tuple[_Shared, int]] = {}
        for module in self._modules:
            self._share([module])

    def _share(self, modules: Sequence[nn.Module]) -> None:
        members = [member(module) for module in modules]
        known = [one for one in members if one is not None]
        if len(known) == len(modules):
            shared = _Shared(Group(known), self._numbers[id(modules[0])])
            self._group_of |= {id(module): (shared, place) for place, module in enumerate(modules)}

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Note which modules are called with the same input while the block runs, and group them from then on."""
        self._looking = True
        try:
            yield
        finally:
            self._looking = False
            by_input: dict[int, list[nn.Module]] = {}
            for module, x in self._called:
                by_input.setdefault(id(x), []).append(module)
            calls = [id(module) for module, _ in self._called]
            for modules in by_input.values():
                if all(id(module) in self._group_of and calls.count(id(module)) == 1 for module in modules):
                    self._share(modules)
            self._called.clear()

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Every product uses the current tape while the block runs."""
        hold = Hold()
        for module in self._modules:
            hold.on(module, self._held(module))
        for module in self._norms:
            hold.on(module, _staged(module))
        try:
            with hold:
                yield
        finally:
            for shared, _ in self._group_of.values():
                shared.forget()

    def _held(self, module: nn.Module) -> Callable[..., Any]:
        inner = own_call(module)
        place_of_module = self._numbers[id(module)]
        shared, place = self._group_of.get(id(module), (None, 0))

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._looking and args:
                self._called.append((module, args[0]))
            tape = _tape.get()
            if tape is None:
                return inner(*args, **kwargs)
            if shared is not None and len(args) == 1 and not kwargs:
                return shared.output(tape, args[0], place)
            if tape.reading:
                result = tape.read(place_of_module, 1)[0]
                out = _replayed(inner, self._slots[id(module)], result, args, kwargs)
                if result is not None:
                    tape.note(out, result)
                return out
            out = inner(*args, **kwargs)
            settle(out)
            tape.write(place_of_module, out)
            return out

        return call


class _Shared:
    """A group whose outputs are made when the first of its members is called, and handed to the others."""

    def __init__(self, group: Group, number: int) -> None:
        """`number` tells the group from others on the tape."""
        self._group, self._number = group, number
        self._input: mx.array | None = None
        self._outputs: list[mx.array] = []

    def forget(self) -> None:
        self._input, self._outputs = None, []

    def output(self, tape: Tape, x: mx.array, place: int) -> mx.array:
        if self._input is not x:
            self._input, self._outputs = x, self._all(tape, x)
        return self._outputs[place]

    def _all(self, tape: Tape, x: mx.array) -> list[mx.array]:
        if not tape.reading:
            outputs, narrow = self._group.forward(x)
            tape.write(self._number, *outputs, *narrow)
            return outputs
        size = len(self._group)
        known = tape.read(self._number, size + len(self._group.learned()) // 2)
        outputs = self._group.replayed(x, known[:size], [z for z in known[size:] if z is not None])
        for output, value in zip(outputs, known, strict=False):
            if value is not None:
                tape.note(output, value)
        return outputs


def _replayed(inner: Callable[..., Any], slots: Slots, result: mx.array | None, args: Any, kwargs: Any) -> mx.array:
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

    primals = [*(inputs[index] for index in floats), *(arrays[index] for index in slots.trainable)]
    if result is None:
        return again(*primals)

    @mx.custom_function
    def product(*primals: mx.array) -> mx.array:
        return result

    @product.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        given = [primals] if isinstance(primals, mx.array) else list(primals)
        grads = mx.vjp(again, given, [cotangent])[1]
        settle(*grads)
        return tuple(grads)

    value: Any = product(*primals)
    out: mx.array = value
    return out
