"""The chain: prologue, block after block, head, and the blocks again from the last to the first.

Only the inputs of the blocks (and, where that is asked, their matrix products) outlive the forward pass; the backward
pass takes one block at a time and hands each of its results on before the next begins. Blocks below the first that
learns are run and forgotten. The order is driven from here and not by one large graph, so the peak is what is kept
and the insides of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxlora.data.sample import Batch
from mlxlora.engine.anatomy import Anatomy
from mlxlora.engine.blocks import Block, BlockFunctions, Invocation
from mlxlora.engine.dropout import split_key
from mlxlora.engine.ends import Ends, NotAChain
from mlxlora.engine.frozen import FrozenStates
from mlxlora.engine.general import General
from mlxlora.engine.masks import Layout, Steering
from mlxlora.engine.precision import beyond_rounding
from mlxlora.engine.scores import Objective, Outcome
from mlxlora.engine.verify import disagreement, likelihood, small_batch

Part = tuple[str, int]  # a part of the step, and the block that it belongs to (−1: none)
FINISH, END = ("finish", -1), ("end", -1)


class Chain:
    """Value and gradient of a step, block by block."""

    def __init__(self, anatomy: Anatomy, steering: Steering, loss_chunk: int, compiled: bool) -> None:
        self._anatomy, self._steering = anatomy, steering
        self.blocks = [Block(module) for module in anatomy.blocks]
        self.ends = Ends(anatomy, steering, loss_chunk, compiled)
        self.functions = BlockFunctions(steering, compiled)
        self._frozen: FrozenStates | None = None
        self.send: Callable[..., None] = mx.async_eval  # how a block's work goes to the device; `mx.eval` waits for it
        self.running: Sequence[int] = range(len(self.blocks))  # what a step runs; fewer while its parts are measured
        self.part: Part = END  # what is computed now
        self.first = next((index for index, block in enumerate(self.blocks) if block.learns), len(self.blocks))

    def close(self) -> None:
        """Forget what was traced and kept."""
        self.ends.close()
        self.functions.close()
        if self._frozen is not None:
            self._frozen.close()
            self._frozen = None

    def keep_frozen(self, limit: int, directory: Path | None, linear: bool, attention_chunk: int) -> None:
        """Keep what the blocks below the first that learns make of a text, up to `limit` bytes."""

        def compute(tokens: mx.array) -> mx.array:
            layout = Layout(linear, chunk=attention_chunk)
            x, calls = self.ends.start(tokens, layout, None)
            for block, (call, sides) in zip(self.blocks[: self.first], calls, strict=False):
                x, _ = self.functions.forward(Invocation(block, call, layout, x, sides, None), keep=False)
                mx.async_eval(x)
            return x

        self._frozen = FrozenStates(compute, limit, directory)

    @property
    def compiled(self) -> bool:
        """Whether the parts are compiled; setting it forgets what was traced."""
        return self.ends.traces.compiled

    @compiled.setter
    def compiled(self, value: bool) -> None:
        self.close()
        self.ends.traces.compiled = self.functions.traces.compiled = value

    def verify(self, layout: Layout, kept: int) -> None:
        """Compare with the general way on a small batch; raises NotAChain where this model needs that one."""
        batch = small_batch(self._anatomy)

        def compare() -> float:
            now = layout.kind  # tables of one precision are not those of another
            found = self.run(likelihood, batch, now, None, True, kept)
            general = General(self._anatomy, self._steering, self.ends.head.chunk, recompute=False, compiled=False)
            return disagreement(found, general.run(likelihood, batch, now, None, True))

        try:
            self.ends.look(layout, batch.tokens)
            x, calls = self.ends.start(batch.tokens, layout, None)
            for block, (call, sides) in zip(self.blocks, calls, strict=True):
                self.functions.learn_needs(Invocation(block, call, layout, x, sides, None))
            error = beyond_rounding(self._anatomy.network, self._anatomy.dtype, compare)
        except (ValueError, TypeError, AttributeError, IndexError, KeyError) as failure:
            raise NotAChain(f"its blocks cannot be called one by one ({failure})") from failure
        if error is not None:
            raise NotAChain(f"block by block, its gradients differ by {error:.1e}")

    def run(
        self, objective: Objective, batch: Batch, layout: Layout, key: mx.array | None, gradients: bool, kept: int
    ) -> tuple[Outcome, dict[str, mx.array]]:
        """The outcome, and the gradients by path (none without `gradients`).

        kept: of how many upper blocks the matrix products are kept; of those below, only the inputs
        """
        keys = [None] * (len(self.blocks) + 1) if key is None else split_key(key, len(self.blocks))
        outer = keys[-1]
        x, calls = self.ends.start(batch.tokens, layout, outer)
        done: list[tuple[Invocation, list[mx.array]]] = []  # what has a backward pass, with its products
        skipped = 0
        # the weights are as the data loader made them: nothing in flight is waited for
        if self._frozen is not None and gradients and np.array(batch.weights).any():
            x, skipped = self._frozen.rows(batch), self.first
        for index in self.running[skipped:]:
            self.part = ("forward", index)
            call, sides = calls[index]
            here = Invocation(self.blocks[index], call, layout, x, sides, keys[index])
            learns = gradients and index >= self.lowest
            x, products = self.functions.forward(here, keep=learns and self.keeps(index, kept))
            if learns:
                done.append((here, products))
            del here
            self.send(x, *products)
        self.part = FINISH
        outcome, slope, outer_grads = self.ends.finish(objective, batch, layout, outer, x, gradients)
        if slope is None:
            return outcome, {}
        self.send(outcome[0], outcome[1], slope, *outer_grads)
        del x
        grads: dict[str, mx.array] = {}
        for index in reversed([index for index in self.running if index >= self.lowest]):
            self.part = ("backward", index)
            here, products = done.pop()
            if not self.keeps(index, kept):
                products = self.functions.again(here)
            assert slope is not None
            found, slope = self.functions.backward(here, products, slope, self.further(index))
            del here, products
            self.send(found, *([] if slope is None else [slope]))
            path, slots = self._anatomy.paths[index], self.blocks[index].slots
            for at, grad in zip(slots.trainable, found, strict=True):
                grads[f"{path}.{slots.paths[at]}"] = grad
        self.part = END
        if self.ends.learns and slope is not None:
            more = self.ends.start_gradient(batch.tokens, layout, outer, slope)
            outer_grads = [a + b for a, b in zip(outer_grads, more, strict=True)]
        for at, grad in zip(self.ends.slots.trainable, outer_grads, strict=True):
            grads[self.ends.slots.paths[at]] = grad
        return outcome, grads

    @property
    def frozen(self) -> int:
        """How many blocks make of a text what they have always made of it."""
        return 0 if self.ends.learns else self.first

    @property
    def lowest(self) -> int:
        """The first block that has a backward pass."""
        return 0 if self.ends.learns else self.first

    def keeps(self, index: int, kept: int) -> bool:
        """Whether that block is one of the upper ones whose products are `kept`.

        The last always is: its backward pass comes first, so its products cost the peak nothing.
        """
        return index >= len(self.blocks) - max(kept, 1)

    def further(self, index: int) -> bool:
        """Whether the gradient goes on below that block."""
        return index > self.first or self.ends.learns
