"""The two ends of the chain: what comes before the first block, and what comes after the last, as traced functions.

Both run the network itself, with blocks that pass on what they are given: whatever a model does around its blocks
(embeddings, masks, norms) is done by the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx

from mlxlora.data.sample import Batch
from mlxlora.engine.anatomy import Anatomy, Reached
from mlxlora.engine.arguments import BatchForm, take_apart
from mlxlora.engine.blocks import Call
from mlxlora.engine.device import settling, settling_afterwards
from mlxlora.engine.dropout import no_dropout_after, set_keys
from mlxlora.engine.head import HeadView, HiddenScores
from mlxlora.engine.hold import Hold
from mlxlora.engine.masks import Layout, Steering
from mlxlora.engine.scores import Objective, Outcome
from mlxlora.engine.slots import Slots
from mlxlora.engine.token_loss import Known
from mlxlora.engine.traces import Traces, given, laid_out


class NotAChain(Exception):
    """This model does more than hand one array from block to block; says what."""


class Ends:
    """What a network computes outside of its blocks.

    slots:  its arrays there
    head:   as a function of hidden states
    learns: whether something there learns that reaches the first block (an embedding, for one); see `look`
    """

    def __init__(self, anatomy: Anatomy, steering: Steering, loss_chunk: int, compiled: bool) -> None:
        self._anatomy, self._steering = anatomy, steering
        self.slots = Slots(anatomy.network, without=anatomy.blocks)
        self.head = HeadView(anatomy, self.slots, loss_chunk)
        self.learns = False
        self.traces = Traces(compiled)
        self._calls: dict[Any, list[tuple[Call, list[int]]]] = {}

    def close(self) -> None:
        """Forget what was traced."""
        self.traces.clear()

    def look(self, layout: Layout, tokens: mx.array) -> None:
        """Find out which learned arrays reach the first block; raises NotAChain where the model is none."""
        now = self.slots.get()
        for index in self.slots.trainable:
            with self.slots.holding([mx.full(now[index].shape, mx.nan, now[index].dtype)], [index]):
                x, calls = self.start(tokens, layout, None)
            self.learns = self.learns or bool(mx.any(mx.isnan(x)).item())
            if any(mx.any(mx.isnan(side)).item() for _, sides in calls for side in sides if _float(side)):
                raise NotAChain("what learns outside of its blocks enters them from the side")

    def start(
        self, tokens: mx.array, layout: Layout, key: mx.array | None
    ) -> tuple[mx.array, list[tuple[Call, list[mx.array]]]]:
        """What reaches the first block, and how each block is called: `(x, [(call, other arrays), …])`."""
        kind = ("start", layout.kind, key is None, layout.segments is None, tokens.shape)
        x, sides = self.traces.of(kind, self._start(kind, layout))(self.slots.get(), tokens, *given(layout, key))
        return x, [(call, [sides[index] for index in indices]) for call, indices in self._calls[kind]]

    def _start(self, kind: Any, layout: Layout) -> Callable[..., Any]:
        def start(
            arrays: list[mx.array], tokens: mx.array, segments: list[mx.array], key: list[mx.array]
        ) -> tuple[mx.array, list[mx.array]]:
            with (
                self._steering.with_layout(laid_out(layout, segments)),
                self.slots.holding(arrays),
                no_dropout_after(self._anatomy),
            ):
                set_keys(self._anatomy, key or None)
                x, calls = self._prologue(tokens)
            sides: list[mx.array] = []
            places: list[tuple[Call, list[int]]] = []
            for args, kwargs in calls:
                found, form = take_apart((args, kwargs))
                indices = []
                for array in found[1:]:
                    known = next((at for at, side in enumerate(sides) if side is array), None)
                    if known is None:
                        known = len(sides)
                        sides.append(array)
                    indices.append(known)
                places.append((Call(form), indices))
            self._calls[kind] = places
            return x, sides

        return start

    def _prologue(self, tokens: mx.array) -> tuple[mx.array, list[tuple[Any, Any]]]:
        """Run the network up to its last block with every block passing on what it is given."""
        calls: list[tuple[Any, Any]] = []
        hold = Hold()
        first: list[mx.array] = []

        def passing(index: int) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                found, _ = take_apart((args, kwargs))
                if not found or index != len(calls) or (first and found[0] is not first[0]):
                    raise NotAChain("its blocks do not hand one array from one to the next")
                first[:] = found[:1]
                calls.append((args, kwargs))
                if len(calls) == len(self._anatomy.blocks):
                    raise Reached(None)
                return found[0]

            return call

        for index, block in enumerate(self._anatomy.blocks):
            hold.on(block, passing(index))
        try:
            with hold:
                self._anatomy.network(tokens)
        except Reached:
            return first[0], calls
        raise NotAChain("not every block is called")

    def _tail(self, tokens: mx.array, last: mx.array) -> mx.array:
        """Run the network from its last block on: what its backbone makes of the last block's output."""
        hold = Hold()
        left = len(self._anatomy.blocks)

        def passing(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            return last if left == 0 else take_apart((args, kwargs))[0][0]

        for block in self._anatomy.blocks:
            hold.on(block, passing)
        with hold:
            return self._anatomy.hidden(tokens)

    def finish(
        self, objective: Objective, batch: Batch, layout: Layout, key: mx.array | None, last: mx.array, gradients: bool
    ) -> tuple[Outcome, mx.array | None, list[mx.array]]:
        """The objective from the last block's output: outcome, gradient of that output, gradients of what learns
        outside."""
        form = BatchForm(batch)
        kind = ("finish", objective, form.key, layout.kind, key is None, gradients, self.head.chunk)
        function = self.traces.of(kind, self._finish(objective, form, layout, gradients))
        out = function(self.slots.get(), form.arrays(batch), last, *given(layout, key))
        return (out[0], None, []) if not gradients else (out[0], out[1], out[2])

    def _finish(self, objective: Objective, form: BatchForm, layout: Layout, gradients: bool) -> Callable[..., Any]:
        trainable = self.slots.trainable

        def finish(
            arrays: list[mx.array],
            inputs: list[mx.array],
            last: mx.array,
            segments: list[mx.array],
            key: list[mx.array],
        ) -> Any:
            batch = form.batch(inputs)
            outer = key[0] if key else None
            learned = [arrays[index] for index in trainable]

            def scores(last: mx.array, known: Known | None) -> HiddenScores:
                states = self._tail(batch.tokens, last)
                rows = states.reshape(-1, states.shape[-1])[batch.loss_positions]
                return self.head.scores(rows, gradients, outer, known)

            def total(last: mx.array, learned: list[mx.array], known: Known | None) -> tuple[mx.array, Any]:
                with self.slots.holding(arrays), self.slots.holding(learned, trainable):
                    sum_, count, metrics = objective(scores(last, known), batch)
                return sum_, (count, metrics)

            with self._steering.with_layout(laid_out(layout, segments)), no_dropout_after(self._anatomy):
                set_keys(self._anatomy, key or None)
                known = None
                with nullcontext() if self.traces.compiled else settling():
                    if not gradients:
                        sum_, (count, metrics) = total(last, learned, None)
                        return ((sum_, count, metrics),)
                    if not self.traces.compiled:
                        with self.slots.holding(arrays):
                            known = scores(last, None).ahead(batch)
                with nullcontext() if self.traces.compiled else settling_afterwards():
                    (sum_, (count, metrics)), slopes = mx.value_and_grad(total, argnums=(0, 1))(last, learned, known)
            return (sum_, count, metrics), slopes[0], slopes[1]

        return finish

    def start_gradient(
        self, tokens: mx.array, layout: Layout, key: mx.array | None, cotangent: mx.array
    ) -> list[mx.array]:
        """Gradients of what learns outside of the blocks by way of what reaches the first block."""
        function = self.traces.of(("start gradient", layout.kind, key is None), self._start_gradient(layout))
        out: list[mx.array] = function(self.slots.get(), tokens, cotangent, *given(layout, key))
        return out

    def _start_gradient(self, layout: Layout) -> Callable[..., Any]:
        trainable = self.slots.trainable

        def start_gradient(
            arrays: list[mx.array],
            tokens: mx.array,
            cotangent: mx.array,
            segments: list[mx.array],
            key: list[mx.array],
        ) -> list[mx.array]:
            def again(*learned: mx.array) -> mx.array:
                with self.slots.holding(arrays), self.slots.holding(learned, trainable):
                    return self._prologue(tokens)[0]

            with self._steering.with_layout(laid_out(layout, segments)), no_dropout_after(self._anatomy):
                set_keys(self._anatomy, key or None)
                grads: list[mx.array] = mx.vjp(again, [arrays[index] for index in trainable], [cotangent])[1]
            return grads

        return start_gradient


def _float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))
