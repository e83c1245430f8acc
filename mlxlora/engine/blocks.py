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

    def forward(
        self,
        block: Block,
        call: Call,
        layout: Layout,
        keep: bool,
        x: mx.array,
        sides: Sequence[mx.array],
        key: mx.array | None,
    ) -> tuple[mx.array, list[mx.array]]:
        """The block's output for `x`, and, to `keep` for its backward pass, its matrix products."""
        kind = ("forward", keep, block.structure, call.key(), layout.kind, key is None)
        function = self.traces.of(kind, self._forward(block, call, layout, keep))
        out, *kept = function(block.slots.get(), x, list(sides), *given(layout, key))
        return out, kept

    def again(
        self,
        block: Block,
        call: Call,
        layout: Layout,
        x: mx.array,
        sides: Sequence[mx.array],
        key: mx.array | None,
    ) -> list[mx.array]:
        """The block's matrix products for `x` once more, without those that only its output needs."""
        kind = ("again", block.structure, call.key(), layout.kind, key is None)
        function = self.traces.of(kind, self._forward(block, call, layout, keep=True, alone=True))
        kept: list[mx.array] = function(block.slots.get(), x, list(sides), *given(layout, key))
        return kept

    def backward(
        self,
        block: Block,
        call: Call,
        layout: Layout,
        x: mx.array,
        sides: Sequence[mx.array],
        key: mx.array | None,
        kept: Sequence[mx.array],
        cotangent: mx.array,
        further: bool,
    ) -> tuple[list[mx.array], mx.array | None]:
        """The gradients of the block's learned arrays, and, if one is wanted `further` down, of its input."""
        kind = ("backward", further, block.structure, call.key(), layout.kind, key is None)
        function = self.traces.of(kind, self._backward(block, call, layout, further))
        grads: list[mx.array] = function(block.slots.get(), x, list(sides), list(kept), cotangent, *given(layout, key))
        return (grads[:-1], grads[-1]) if further else (grads, None)

    def _template(self, block: Block) -> tuple[Block, Products]:
        """The block that stands for all of its structure."""
        if block.structure not in self._templates:
            self._templates[block.structure] = (block, Products(block.module))
        return self._templates[block.structure]

    def _forward(
        self, block: Block, call: Call, layout: Layout, keep: bool, alone: bool = False
    ) -> Callable[..., list[mx.array]]:
        """The output and what is kept; or that `alone`."""
        block, products = self._template(block)
        unread = self._unread.get((block.structure, call.key()), frozenset())

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

    def _backward(self, block: Block, call: Call, layout: Layout, further: bool) -> Callable[..., Any]:
        block, products = self._template(block)
        unread = self._unread.get((block.structure, call.key()), frozenset())
        slots = block.slots

        def backward(
            arrays: list[mx.array],
            x: mx.array,
            sides: list[mx.array],
            kept: list[mx.array],
            cotangent: mx.array,
            segments: list[mx.array],
            key: list[mx.array],
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

    def learn_needs(self, block: Block, call: Call, layout: Layout, x: mx.array, sides: Sequence[mx.array]) -> None:
        """Find out, on a small batch, what the products of such a block need.

        Which layers share their input, and which products the backward pass never looks at (the last before a
        residual sum, say): each in turn is replaced by "not a number"; if every gradient stays what it was to the bit,
        nobody read it.
        """
        name = (block.structure, call.key())
        if name in self._unread:
            return
        self.traces.clear()
        _, products = self._template(block)
        with products.looking():
            self.forward(block, call, layout, True, x, sides, None)
        out, kept = self.forward(block, call, layout, True, x, sides, None)
        sites = self._sites
        slope = mx.random.normal(out.shape, key=mx.random.key(0)).astype(out.dtype)

        def gradients(kept: list[mx.array]) -> list[mx.array]:
            grads, last = self.backward(block, call, layout, x, sides, None, kept, slope, True)
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
        self._unread[name] = frozenset(unread)
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
