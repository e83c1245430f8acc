"""The general way: one graph for the whole step, differentiated as one.

It needs nothing of a model but its logits, so it holds for every architecture. Where the head could be told apart, only
positions that carry weight reach it, a chunk at a time; where the blocks could, each keeps only its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.data.sample import Batch
from mlxlora.engine.anatomy import Anatomy
from mlxlora.engine.arguments import BatchForm, put_together, take_apart
from mlxlora.engine.device import settling, settling_afterwards
from mlxlora.engine.dropout import no_dropout_after, set_block_key, set_keys, split_key
from mlxlora.engine.head import HeadView
from mlxlora.engine.hold import Hold, own_call
from mlxlora.engine.masks import Layout, Steering
from mlxlora.engine.scores import Objective, Outcome
from mlxlora.engine.slots import Slots
from mlxlora.engine.traces import Traces


class General:
    """Value and gradient of a whole step in one graph."""

    def __init__(self, anatomy: Anatomy, steering: Steering, loss_chunk: int, recompute: bool, compiled: bool) -> None:
        self._anatomy, self._steering, self._recompute = anatomy, steering, recompute
        self._slots = Slots(anatomy.network)
        self._head = HeadView(anatomy, self._slots, loss_chunk)
        self._block_slots = [Slots(block) for block in anatomy.blocks]
        self._traces = Traces(compiled)

    def close(self) -> None:
        """Forget what was compiled."""
        self._traces.clear()

    def run(
        self, objective: Objective, batch: Batch, layout: Layout, key: mx.array | None, gradients: bool
    ) -> tuple[Outcome, dict[str, mx.array]]:
        """The outcome, and the gradients by path (none without `gradients`)."""
        form = BatchForm(batch)
        kind = (objective, form.key, layout.kind, key is None, gradients)
        step = self._traces.of(kind, self._step(objective, form, layout, gradients))
        given = [] if key is None else [key]
        outcome, grads = step(self._slots.get(), form.arrays(batch), *given)
        paths = [self._slots.paths[index] for index in self._slots.trainable]
        return outcome, dict(zip(paths, grads, strict=gradients))

    def _step(self, objective: Objective, form: BatchForm, layout: Layout, gradients: bool) -> Callable[..., Any]:
        def step(arrays: list[mx.array], inputs: list[mx.array], key: mx.array | None = None) -> Any:
            batch = form.batch(inputs)

            def total(learned: list[mx.array]) -> tuple[mx.array, tuple[mx.array, Any]]:
                with self._slots.holding(arrays), self._slots.holding(learned, self._slots.trainable):
                    sum_, count, metrics = self.outcome(objective, batch, key, gradients)
                return sum_, (count, metrics)

            learned = [arrays[index] for index in self._slots.trainable]
            settled = nullcontext() if self._traces.compiled else settling_afterwards() if gradients else settling()
            steered = self._steering.with_layout(replace(layout, segments=batch.segments))
            with steered, no_dropout_after(self._anatomy), settled:
                if not gradients or not learned:
                    sum_, (count, metrics) = total(learned)
                    return (sum_, count, metrics), []
                (sum_, (count, metrics)), slopes = mx.value_and_grad(total)(learned)
                return (sum_, count, metrics), slopes

        return step

    def outcome(self, objective: Objective, batch: Batch, key: mx.array | None, gradients: bool) -> Outcome:
        """The objective for `batch` with the arrays that stand in the network now; differentiable."""
        keys = None if key is None else split_key(key, len(self._anatomy.blocks))
        set_keys(self._anatomy, keys)
        with ExitStack() as stack:
            if self._recompute and gradients:
                stack.enter_context(self._checkpointing(keys))
            if self._anatomy.backbone is None:
                states = self._anatomy.network(batch.tokens)
            else:
                states = self._anatomy.hidden(batch.tokens)
        rows = states.reshape(-1, states.shape[-1])[batch.loss_positions]
        return objective(self._head.scores(rows, gradients, None if keys is None else keys[-1]), batch)

    def _checkpointing(self, keys: Sequence[mx.array] | None) -> Hold:
        hold = Hold()
        for index, (block, slots) in enumerate(zip(self._anatomy.blocks, self._block_slots, strict=True)):
            hold.on(block, _checkpointed(block, slots, None if keys is None else keys[index]))
        return hold


def _checkpointed(block: nn.Module, slots: Slots, key: mx.array | None) -> Callable[..., Any]:
    """The block as a function that keeps its inputs alone; its dropout masks come from `key` each time it runs."""
    inner = own_call(block)

    def call(*args: Any, **kwargs: Any) -> Any:
        inputs, form = take_apart((args, kwargs))
        arrays = slots.get()  # as they are in this trace: the backward pass comes when they are gone from the slots

        def again(learned: list[mx.array], inputs: list[mx.array]) -> Any:
            args, kwargs = put_together(inputs, form)
            with slots.holding(arrays), slots.holding(learned, slots.trainable):
                set_block_key(block, key)  # no argument: MLX would look for its gradient
                return inner(*args, **kwargs)

        learned = [arrays[index] for index in slots.trainable]
        return mx.checkpoint(again)(learned, inputs)

    return call
