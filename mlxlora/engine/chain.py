"""The chain: prologue, block after block, head, and the blocks again from the last to the first.

Only the inputs of the blocks (and, where that is asked, their matrix products) outlive the forward pass; the backward
pass takes one block at a time and hands each of its results on before the next begins. Blocks below the first that
learns are run and forgotten. The order is driven from here and not by one large graph, so the peak is what is kept
and the insides of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlxlora.data.sample import Batch
from mlxlora.engine.anatomy import Anatomy, Reached, tolerance
from mlxlora.engine.arguments import BatchForm, take_apart
from mlxlora.engine.blocks import Block, BlockFunctions, Call, Grade
from mlxlora.engine.device import settling, settling_afterwards
from mlxlora.engine.dropout import no_dropout_after, set_keys, split_key
from mlxlora.engine.frozen import FrozenStates
from mlxlora.engine.general import General
from mlxlora.engine.head import HeadView, HiddenScores
from mlxlora.engine.hold import Hold
from mlxlora.engine.masks import Layout, Steering
from mlxlora.engine.scores import Objective, Outcome
from mlxlora.engine.slots import Slots
from mlxlora.engine.token_loss import Known
from mlxlora.engine.traces import Traces
from mlxlora.engine.verify import disagreement, likelihood, small_batch

Part = tuple[str, int]  # a part of the step, and the block that it belongs to (−1: none)
FINISH, END = ("finish", -1), ("end", -1)


class NotAChain(Exception):
    """This model does more than hand one array from block to block; says what."""


class Chain:
    """Value and gradient of a step, block by block."""

    def __init__(self, anatomy: Anatomy, steering: Steering, loss_chunk: int, compiled: bool) -> None:
        self._anatomy, self._steering = anatomy, steering
        self.blocks = [Block(module) for module in anatomy.blocks]
        self.outside = Slots(anatomy.network, without=anatomy.blocks)
        self.head = HeadView(anatomy, self.outside, loss_chunk)
        self.functions = BlockFunctions(steering, compiled)
        self._traces = Traces(compiled)
        self._calls: dict[Any, list[tuple[Call, list[int]]]] = {}
        self._frozen: FrozenStates | None = None
        self.send: Callable[..., None] = mx.async_eval  # how a block's work goes to the device; `mx.eval` waits for it
        self.running: Sequence[int] = range(len(self.blocks))  # what a step runs; fewer while its parts are measured
        self.part: Part = END  # what is computed now
        self.first = next((index for index, block in enumerate(self.blocks) if block.learns), len(self.blocks))

    def close(self) -> None:
        """Forget what was traced and kept."""
        self._traces.clear()
        self.functions.close()
        if self._frozen is not None:
            self._frozen.close()
            self._frozen = None

    def keep_frozen(self, limit: float, directory: str, linear: bool, attention_chunk: int) -> None:
        """Keep what the blocks below the first that learns make of a text, up to `limit` bytes."""
        if self._starts_learning or self.first == 0 or limit <= 0:
            return

        def compute(tokens: mx.array) -> mx.array:
            layout = Layout(linear, chunk=attention_chunk)
            x, calls = self.start(tokens, layout, None)
            for block, (call, sides) in zip(self.blocks[: self.first], calls, strict=False):
                x, _ = self.functions.forward(block, call, layout, False, x, sides, None)
                mx.async_eval(x)
            return x

        self._frozen = FrozenStates(compute, limit, directory)

    @property
    def compiled(self) -> bool:
        """Whether the parts are compiled; setting it forgets what was traced."""
        return self._traces.compiled

    @compiled.setter
    def compiled(self, value: bool) -> None:
        self.close()
        self._traces.compiled = self.functions.traces.compiled = value

    def verify(self, layout: Layout, grade: Grade) -> None:
        """Compare with the general way on a small batch; raises NotAChain where this model needs that one."""
        batch = small_batch(self._anatomy)
        try:
            self.look(layout, batch.tokens)
            x, calls = self.start(batch.tokens, layout, None)
            for block, (call, sides) in zip(self.blocks, calls, strict=True):
                self.functions.learn_needs(block, call, layout, x, sides)
            found = self.run(likelihood, batch, layout, None, True, grade)
        except (ValueError, TypeError, AttributeError, IndexError, KeyError) as failure:
            raise NotAChain(f"its blocks cannot be called one by one ({failure})") from failure
        general = General(self._anatomy, self._steering, self.head.chunk, recompute=False, compiled=False)
        error = disagreement(found, general.run(likelihood, batch, layout, None, True))
        if not error <= tolerance(self._anatomy.dtype):
            raise NotAChain(f"block by block, its gradients differ by {error:.1e}")

    # ---- the parts -------------------------------------------------------------------------------------------------

    def start(
        self, tokens: mx.array, layout: Layout, key: mx.array | None
    ) -> tuple[mx.array, list[tuple[Call, list[mx.array]]]]:
        """What reaches the first block, and how each block is called: `(x, [(call, other arrays), …])`."""
        kind = ("start", layout.kind, key is None, layout.segments is None, tokens.shape)
        x, sides = self._traces.of(kind, self._start(kind, layout))(self.outside.get(), tokens, *_given(layout, key))
        return x, [(call, [sides[index] for index in indices]) for call, indices in self._calls[kind]]

    def _start(self, kind: Any, layout: Layout) -> Callable[..., Any]:
        def start(
            arrays: list[mx.array], tokens: mx.array, segments: list[mx.array], key: list[mx.array]
        ) -> tuple[mx.array, list[mx.array]]:
            with (
                self._steering.with_layout(_over(layout, segments)),
                self.outside.holding(arrays),
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
                if len(calls) == len(self.blocks):
                    raise Reached(None)
                return found[0]

            return call

        for index, block in enumerate(self.blocks):
            hold.on(block.module, passing(index))
        try:
            with hold:
                self._anatomy.network(tokens)
        except Reached:
            return first[0], calls
        raise NotAChain("not every block is called")

    def _tail(self, tokens: mx.array, last: mx.array) -> mx.array:
        """Run the network from its last block on: what its backbone makes of the last block's output."""
        hold = Hold()
        left = len(self.blocks)

        def passing(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            return last if left == 0 else take_apart((args, kwargs))[0][0]

        for block in self.blocks:
            hold.on(block.module, passing)
        with hold:
            return self._anatomy.hidden(tokens)

    def finish(
        self, objective: Objective, batch: Batch, layout: Layout, key: mx.array | None, last: mx.array, gradients: bool
    ) -> tuple[Outcome, mx.array | None, list[mx.array]]:
        """The objective from the last block's output: outcome, gradient of that output, gradients of what learns
        outside."""
        form = BatchForm(batch)
        kind = ("finish", objective, form.key, layout.kind, key is None, gradients, self.head.chunk)
        function = self._traces.of(kind, self._finish(objective, form, layout, gradients))
        out = function(self.outside.get(), form.arrays(batch), last, *_given(layout, key))
        return (out[0], None, []) if not gradients else (out[0], out[1], out[2])

    def _finish(self, objective: Objective, form: BatchForm, layout: Layout, gradients: bool) -> Callable[..., Any]:
        trainable = self.outside.trainable

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
                with self.outside.holding(arrays), self.outside.holding(learned, trainable):
                    sum_, count, metrics = objective(scores(last, known), batch)
                return sum_, (count, metrics)

            with self._steering.with_layout(_over(layout, segments)), no_dropout_after(self._anatomy):
                set_keys(self._anatomy, key or None)
                known = None
                with nullcontext() if self.compiled else settling():
                    if not gradients:
                        sum_, (count, metrics) = total(last, learned, None)
                        return ((sum_, count, metrics),)
                    if not self.compiled:
                        with self.outside.holding(arrays):
                            known = scores(last, None).ahead(batch)
                with nullcontext() if self.compiled else settling_afterwards():
                    (sum_, (count, metrics)), slopes = mx.value_and_grad(total, argnums=(0, 1))(last, learned, known)
            return (sum_, count, metrics), slopes[0], slopes[1]

        return finish

    def start_gradient(
        self, tokens: mx.array, layout: Layout, key: mx.array | None, cotangent: mx.array
    ) -> list[mx.array]:
        """Gradients of what learns outside of the blocks by way of what reaches the first block."""
        function = self._traces.of(("start gradient", layout.kind, key is None), self._start_gradient(layout))
        out: list[mx.array] = function(self.outside.get(), tokens, cotangent, *_given(layout, key))
        return out

    def _start_gradient(self, layout: Layout) -> Callable[..., Any]:
        trainable = self.outside.trainable

        def start_gradient(
            arrays: list[mx.array],
            tokens: mx.array,
            cotangent: mx.array,
            segments: list[mx.array],
            key: list[mx.array],
        ) -> list[mx.array]:
            def again(*learned: mx.array) -> mx.array:
                with self.outside.holding(arrays), self.outside.holding(learned, trainable):
                    return self._prologue(tokens)[0]

            with self._steering.with_layout(_over(layout, segments)), no_dropout_after(self._anatomy):
                set_keys(self._anatomy, key or None)
                grads: list[mx.array] = mx.vjp(again, [arrays[index] for index in trainable], [cotangent])[1]
            return grads

        return start_gradient

    # ---- the whole -------------------------------------------------------------------------------------------------

    def run(
        self, objective: Objective, batch: Batch, layout: Layout, key: mx.array | None, gradients: bool, grade: Grade
    ) -> tuple[Outcome, dict[str, mx.array]]:
        """The outcome, and the gradients by path (none without `gradients`)."""
        keys = None if key is None else split_key(key, len(self.blocks))
        outer = None if keys is None else keys[-1]
        x, calls = self.start(batch.tokens, layout, outer)
        inputs: list[mx.array | None] = []
        kept: list[list[mx.array]] = []
        skipped = 0
        if self._frozen is not None and gradients and bool(mx.any(batch.weights != 0).item()):
            x, skipped = self._frozen.rows(batch), self.first
            inputs, kept = [None] * skipped, [[] for _ in range(skipped)]
        for index in self.running[skipped:]:
            self.part = ("forward", index)
            block, (call, sides) = self.blocks[index], calls[index]
            keeps = gradients and (index >= self.first or self._starts_learning)
            inputs.append(x if keeps else None)
            # the last block's backward pass comes first: keeping its products costs the peak nothing
            keep = keeps and (grade == "products" or index == len(self.blocks) - 1)
            x, products = self.functions.forward(
                block, call, layout, keep, x, sides, None if keys is None else keys[index]
            )
            kept.append(products)
            self.send(x, *products)
        self.part = FINISH
        outcome, slope, outer_grads = self.finish(objective, batch, layout, outer, x, gradients)
        if slope is None:
            return outcome, {}
        self.send(outcome[0], outcome[1], slope, *outer_grads)
        del x
        grads: dict[str, mx.array] = {}
        for index in reversed([index for index in self.running if index >= self.lowest]):
            self.part = ("backward", index)
            block, (call, sides) = self.blocks[index], calls[index]
            given = inputs.pop()
            while given is None:
                given = inputs.pop()
            further = self.further(index)
            assert slope is not None
            key_of = None if keys is None else keys[index]
            products = kept.pop()
            if grade == "inputs" and index < len(self.blocks) - 1:
                products = self.functions.forward(block, call, layout, True, given, sides, key_of)[1]
            found, slope = self.functions.backward(block, call, layout, given, sides, key_of, products, slope, further)
            del products
            del given
            self.send(found, *([] if slope is None else [slope]))
            path = self._anatomy.paths[index]
            for at, grad in zip(block.slots.trainable, found, strict=True):
                grads[f"{path}.{block.slots.paths[at]}"] = grad
        self.part = END
        if self._starts_learning and slope is not None:
            more = self.start_gradient(batch.tokens, layout, outer, slope)
            outer_grads = [a + b for a, b in zip(outer_grads, more, strict=True)]
        for at, grad in zip(self.outside.trainable, outer_grads, strict=True):
            grads[self.outside.paths[at]] = grad
        return outcome, grads

    @property
    def lowest(self) -> int:
        """The first block that has a backward pass."""
        return 0 if self._starts_learning else self.first

    def further(self, index: int) -> bool:
        """Whether the gradient goes on below that block."""
        return index > self.first or self._starts_learning

    @property
    def _starts_learning(self) -> bool:
        """Whether something outside of the blocks learns that may reach the first block (an embedding, for one)."""
        return bool(self._reaching)

    _reaching: Sequence[int] = ()

    def look(self, layout: Layout, tokens: mx.array) -> None:
        """Find out which learned arrays reach the first block; raises NotAChain where the model is none."""
        now = self.outside.get()
        reaching = []
        for index in self.outside.trainable:
            with self.outside.holding([mx.full(now[index].shape, mx.nan, now[index].dtype)], [index]):
                x, calls = self.start(tokens, layout, None)
            if mx.any(mx.isnan(x)).item():
                reaching.append(index)
            if any(mx.any(mx.isnan(side)).item() for _, sides in calls for side in sides if _float(side)):
                raise NotAChain("what learns outside of its blocks enters them from the side")
        self._reaching = reaching


def _float(array: mx.array) -> bool:
    return bool(mx.issubdtype(array.dtype, mx.floating))


def _given(layout: Layout, key: mx.array | None) -> tuple[list[mx.array], list[mx.array]]:
    return ([] if layout.segments is None else [layout.segments]), ([] if key is None else [key])


def _over(layout: Layout, segments: Sequence[mx.array]) -> Layout:
    return replace(layout, segments=segments[0] if segments else None)
