"""The layers of a block that are matrix products, held so that a tape keeps their results; and its norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.adapters import AdapterLayer
from mlxlora.adapters.heads import Whole
from mlxlora.adapters.lora import LoRARouter
from mlxlora.engine import norms
from mlxlora.engine.arguments import put_together, take_apart
from mlxlora.engine.device import settle, settles, stage
from mlxlora.engine.hold import Hold, own_call, own_class
from mlxlora.engine.linear import Group, member
from mlxlora.engine.slots import Slots
from mlxlora.engine.tape import Tape, current, on

_SWITCHES = frozenset({"SwitchLinear", "QuantizedSwitchLinear", "MultiLinear", "QuantizedMultiLinear"})


def products(block: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules of `block` whose call is a matrix product (adapters count as one with what they adapt); its norms."""
    found: list[nn.Module] = []
    between: list[nn.Module] = []

    def walk(value: Any) -> None:
        if isinstance(value, (LoRARouter, Whole)):
            return  # small, and no array comes out; what is called of the other are its halves
        if isinstance(value, nn.Module) and (
            isinstance(value, (AdapterLayer, nn.Linear, nn.QuantizedLinear)) or own_class(value).__name__ in _SWITCHES
        ):
            found.append(value)
        elif isinstance(value, nn.Module) and _is_norm(value):
            between.append(value)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)

    walk(block)
    return found, between


def _is_norm(module: nn.Module) -> bool:
    """Whether this is one of MLX's own norms, or one that a model made of MLX's `rms_norm`."""
    return isinstance(module, (nn.RMSNorm, nn.LayerNorm)) or (
        norms.steered(module) is not None and not module.children()
    )


def _staged(module: nn.Module) -> Callable[..., Any]:
    """A norm that parts the backward pass: its gradient is made of many arrays, and so is that of a rotation."""
    inner = (norms.steered(module) if settles() else None) or own_call(module)

    def call(*args: Any, **kwargs: Any) -> Any:
        tape = current()
        out = inner(*args, **kwargs)
        if tape is None or not tape.reading or not isinstance(out, mx.array):
            return out
        settle(out)
        return stage(out)

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
            tape = current()
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
            if not isinstance(out, mx.array):
                raise TypeError("a layer of a block returns more than one array")
            tape.settle(place_of_module, out)
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
            tape.settle(self._number, *outputs)
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
