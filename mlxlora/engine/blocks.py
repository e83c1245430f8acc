"""One block at a time, forward and backward, as functions of its arrays.

Blocks of equal structure share their functions: each is traced on the first block of its kind and given the arrays of
the one that is to run, so compiling takes as long for forty blocks as for one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.engine import tape
from mlxlora.engine.arguments import put_together
from mlxlora.engine.device import settling, settling_afterwards
from mlxlora.engine.dropout import set_block_key
from mlxlora.engine.hold import own_call
from mlxlora.engine.masks import Layout, Steering
from mlxlora.engine.products import Products
from mlxlora.engine.slots import Slots
from mlxlora.engine.structure import structure
from mlxlora.engine.traces import Traces, given, laid_out


@dataclass(frozen=True)
class Call:
    """How the backbone calls a block: its arguments without arrays (`form`), hashable as far as it goes.

    The first array among the arguments is the hidden states; the others go by the name of sides.
    """

    form: Any

    def key(self) -> Any:
        """Equal for two calls that one trace serves."""
        return _hashable(self.form)

    def arguments(self, x: mx.array, sides: Sequence[mx.array]) -> Any:
        """The `(args, kwargs)` for these arrays."""
        return put_together([x, *sides], self.form)


class Block:
    """One block of the network, and where its arrays stand."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.slots = Slots(module)
        self.learns = bool(self.slots.trainable)
        self.structure = structure(module)


@dataclass(frozen=True, slots=True)
class Invocation:
    """One block, and what it is called with in a step: hidden states, other arrays, and the key of its dropout."""

    block: Block
    call: Call
    layout: Layout
    x: mx.array
    sides: Sequence[mx.array]
    key: mx.array | None

    @property
    def kind(self) -> tuple[Any, Any]:
        """Equal for two blocks that compute the same of their arrays."""
        return self.block.structure, self.call.key()

    def arrays(self) -> tuple[Any, ...]:
        """All arrays of it, as arguments of a traced function."""
        return self.block.slots.get(), self.x, list(self.sides), *given(self.layout, self.key)


class BlockFunctions:
    """The functions of all blocks of one network, traced as they are needed."""

    def __init__(self, steering: Steering, compiled: bool) -> None:
        self._steering = steering
        self.traces = Traces(compiled)
        self._unread: dict[Any, frozenset[tape.Site]] = {}
        self._sites: list[tape.Site] = []  # of the tape that was written last
        self._templates: dict[Any, tuple[Block, Products]] = {}

    def close(self) -> None:
        """Forget what was traced."""
        self.traces.clear()

    def forward(self, here: Invocation, keep: bool) -> tuple[mx.array, list[mx.array]]:
        """The block's output, and, to `keep` for its backward pass, its matrix products."""
        out, *kept = self._traced("forward", here, keep, self._forward(here, keep))(*here.arrays())
        return out, kept

    def again(self, here: Invocation) -> list[mx.array]:
        """The block's matrix products once more, without those that only its output needs."""
        function = self._traced("again", here, True, self._forward(here, keep=True, alone=True))
        kept: list[mx.array] = function(*here.arrays())
        return kept

    def backward(
        self, here: Invocation, kept: Sequence[mx.array], cotangent: mx.array, further: bool
    ) -> tuple[list[mx.array], mx.array | None]:
        """The gradients of the block's learned arrays, and, if one is wanted `further` down, of its input."""
        function = self._traced("backward", here, further, self._backward(here, further))
        grads: list[mx.array] = function(*here.arrays(), list(kept), cotangent)
        return (grads[:-1], grads[-1]) if further else (grads, None)

    def _traced(self, what: str, here: Invocation, how: bool, function: Callable[..., Any]) -> Callable[..., Any]:
        return self.traces.of((what, how, *here.kind, here.layout.kind, here.key is None), function)

    def _template(self, block: Block) -> tuple[Block, Products]:
        """The block that stands for all of its structure."""
        if block.structure not in self._templates:
            self._templates[block.structure] = (block, Products(block.module))
        return self._templates[block.structure]

    def _forward(self, here: Invocation, keep: bool, alone: bool = False) -> Callable[..., list[mx.array]]:
        """The output and what is kept; or that `alone`."""
        block, products = self._template(here.block)
        call, layout = here.call, here.layout  # and not `here`, whose arrays a trace would keep
        unread = self._unread.get(here.kind, frozenset())

        def forward(
            arrays: list[mx.array], x: mx.array, sides: list[mx.array], segments: list[mx.array], key: list[mx.array]
        ) -> list[mx.array]:
            written = tape.Tape(unread=unread, keeps=keep, alone=alone)
            settled = nullcontext() if self.traces.compiled else settling()
            with self._within(block, layout, segments, key), block.slots.holding(arrays), settled:
                out = _run(block, products, call, x, sides, written)
            self._sites = written.sites
            return written.results if alone else [out, *written.results]

        return forward

    def _backward(self, here: Invocation, further: bool) -> Callable[..., list[mx.array]]:
        block, products = self._template(here.block)
        call, layout = here.call, here.layout
        unread = self._unread.get(here.kind, frozenset())
        slots = block.slots

        def backward(
            arrays: list[mx.array],
            x: mx.array,
            sides: list[mx.array],
            segments: list[mx.array],
            key: list[mx.array],
            kept: list[mx.array],
            cotangent: mx.array,
        ) -> list[mx.array]:
            def again(*primals: mx.array) -> mx.array:
                hidden, learned = (primals[-1], primals[:-1]) if further else (x, primals)
                with slots.holding(learned, slots.trainable):
                    return _run(block, products, call, hidden, sides, tape.Tape(kept, unread))

            primals = [arrays[index] for index in slots.trainable] + ([x] if further else [])
            # the gradients of single products are traced inside of this, when `again` is over
            settled = nullcontext() if self.traces.compiled else settling_afterwards()
            with self._within(block, layout, segments, key), slots.holding(arrays), settled:
                grads: list[mx.array] = mx.vjp(again, primals, [cotangent])[1]
            return grads

        return backward

    @contextmanager
    def _within(
        self, block: Block, layout: Layout, segments: Sequence[mx.array], key: Sequence[mx.array]
    ) -> Iterator[None]:
        with self._steering.with_layout(laid_out(layout, segments)):
            set_block_key(block.module, key[0] if key else None)
            try:
                yield
            finally:
                set_block_key(block.module, None)

    def learn_needs(self, here: Invocation) -> None:
        """Find out, on a small batch, what the products of such a block need.

        Which layers share their input, and which products the backward pass never looks at (the last before a
        residual sum, say): each in turn is replaced by "not a number"; if every gradient stays what it was to the bit,
        nobody read it.
        """
        if here.kind in self._unread:
            return
        self.traces.clear()
        _, products = self._template(here.block)
        with products.looking():
            self.forward(here, keep=True)
        out, kept = self.forward(here, keep=True)
        sites = self._sites
        slope = mx.random.normal(out.shape, key=mx.random.key(0)).astype(out.dtype)

        def gradients(kept: list[mx.array]) -> list[mx.array]:
            grads, last = self.backward(here, kept, slope, further=True)
            return [*grads, *([] if last is None else [last])]

        expected = gradients(kept)
        unread = set(sites)
        for site in set(sites):
            spoilt = [
                mx.full(result.shape, mx.nan, result.dtype) if where == site else result
                for where, result in zip(sites, kept, strict=True)
            ]
            found = gradients(spoilt)
            if not all(mx.array_equal(a, b).item() for a, b in zip(found, expected, strict=True)):
                unread.discard(site)
        self._unread[here.kind] = frozenset(unread)
        self.traces.clear()


def _run(
    block: Block, products: Products, call: Call, x: mx.array, sides: Sequence[mx.array], on: tape.Tape
) -> mx.array:
    args, kwargs = call.arguments(x, sides)
    with products.holding(), tape.on(on):
        out: Any = own_call(block.module)(*args, **kwargs)
    if not isinstance(out, mx.array):
        raise TypeError("a block returns more than one array")
    return out


def _hashable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _hashable(item)) for name, item in value.items())
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
