"""Will it fit, and how long will it take: an account of the step, calibrated by short real ones.

    peak = resident + max(step, update, validation)
    resident    weights, adapter, moments: what lies there between two steps; counted
    step        activations, loss, gradients: the engine's own account of its parts, block by block (engine/account.py)
    update      gradients and what the optimizer makes of them: measured on a part of the arrays (measured.py)
    validation  the forward pass of the longest validation batch, by the engine's account

A model whose step is one graph has no parts: its step is a line through two steps with a few of its blocks in place,
or, where it cannot run without all of its blocks, a step of the whole (measured.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx

from mlxlora.adapters.inject import kept_aside
from mlxlora.data import Batch
from mlxlora.data.feed import Feed
from mlxlora.engine import Engine
from mlxlora.engine.account import Account
from mlxlora.engine.config import CheckpointBlocks
from mlxlora.memory import collect_garbage
from mlxlora.parameters import bytes_of, flat
from mlxlora.training.measured import one_graph, update_needs
from mlxlora.training.optimizer import Optimizer
from mlxlora.training.shapes import Shape, computed_of, ladder, synthetic, tokens_computed

SHORTEST = 16  # tokens of a row
GROWS = 4096  # tokens of a row whose memory surely grows with their number
BEYOND = 1.2  # times the longest row that was measured: so far its tokens tell what more of them take


@dataclass(frozen=True)
class Forecast:
    """What training needs with batches of one shape, in bytes.

    weights, adapter, moments: what lies in memory between two steps; weights with all else that lies there now
    step, update, validation:  what comes on top, one after the other
    by_loss: what of the step is the loss alone, where it decides; else 0
    seconds: of one step, all of its micro-batches, without the update
    frozen_seconds: what of them the blocks take that make the same of a text in every epoch
    update_seconds: of the update that ends it
    validation_seconds: of the largest batch to validate on
    unpadded: whether the engine leaves out padding, where that is worth it
    """

    checkpoint_blocks: CheckpointBlocks
    loss_chunk: int
    accumulate: int
    shape: Shape
    weights: int
    adapter: int
    moments: int
    step: int
    update: int
    validation: int
    by_loss: int
    seconds: float
    validation_seconds: float
    unpadded: bool
    update_seconds: float
    frozen_seconds: float = 0.0

    @property
    def computed(self) -> int:
        """Tokens of the batch that are computed."""
        return tokens_computed(self.shape, self.unpadded)

    @property
    def resident(self) -> int:
        """What lies in memory between two steps."""
        return self.weights + self.adapter + self.moments

    @property
    def peak(self) -> int:
        """The most that will be in use."""
        return self.resident + max(self.step, self.update, self.validation)


class Forecaster:
    """Foretells what a run with this engine and optimizer needs. Takes stock when it is made.

    limit: bytes beyond which nothing is tried on this machine
    """

    def __init__(self, engine: Engine, optimizer: Optimizer, objective: Any, vocabulary: int, limit: int) -> None:
        self.engine, self.objective, self.vocabulary, self.limit = engine, objective, vocabulary, limit
        collect_garbage()  # or it would count as what stays, and go while something is measured
        learned = flat(engine.network.trainable_parameters())
        mx.eval(engine.network.parameters(), optimizer.state)
        self.adapter, self.moments = bytes_of(learned), bytes_of(optimizer.state)
        self.weights = max(mx.get_active_memory() - self.adapter - self.moments, 0) + kept_aside(engine.network)
        self.update, self.update_seconds = update_needs(optimizer.config, learned)
        self._known: dict[Any, Account] = {}

    @property
    def resident(self) -> int:
        """What lies in memory between two steps."""
        return self.weights + self.adapter + self.moments

    def forecast(self, shape: Shape, accumulate: int = 1, validation: Shape | None = None) -> Forecast:
        """What training on batches of that shape needs, and validation on those of another, as the engine is set."""
        step = self.step(shape)
        summed = self.adapter if accumulate > 1 else 0  # the gradient so far, beside that of a micro-batch
        validating = self.step(validation, gradients=False) if validation else Account(0, 0, 0, 0.0)
        return Forecast(
            checkpoint_blocks=self.engine.config.checkpoint_blocks,
            loss_chunk=self.engine.config.loss_chunk,
            accumulate=accumulate,
            shape=shape,
            weights=self.weights,
            adapter=self.adapter,
            moments=self.moments,
            step=step.peak + summed,
            update=self.update,
            validation=validating.peak,
            by_loss=step.by_loss,
            seconds=step.seconds * accumulate,
            validation_seconds=validating.seconds,
            unpadded=self.engine.leaves_out_padding,
            update_seconds=self.update_seconds,
            frozen_seconds=step.frozen * accumulate,
        )

    def step(self, shape: Shape, *, gradients: bool = True) -> Account:
        """The account of one step. A batch too large to be tried within the limit is told by proportion to smaller."""
        room, config = self.limit - self.resident, self.engine.config
        size = partial(tokens_computed, unpadded=self.engine.leaves_out_padding)
        found: Account | None = None
        before = shape

        def growth(now: Shape) -> float:
            return float(size(now) / size(before) * (now.length / before.length) ** (self.power - 1))

        for now in ladder(shape):
            if found is not None and found.few * growth(now) > room:
                return scaled(found, growth(shape), size(shape) / size(before))
            key = (now, config.checkpoint_blocks, config.loss_chunk, gradients)
            if key not in self._known:
                self._known[key] = self._account(synthetic(now, self.vocabulary), gradients)
            found, before = self._known[key], now
        assert found is not None
        return found

    @property
    def power(self) -> float:
        """Of the length of a row, with which memory grows in long ones."""
        return 2.0 if self.engine.keeps_squares else 1.0

    def onward(self, known: Sequence[Forecast], length: int) -> int:
        """The peak with a row of that length, from those with shorter ones: the last two tell how it grows."""
        a, b = known[-2:]
        short, long, here = (float(tokens**self.power) for tokens in (a.shape.length, b.shape.length, length))
        return b.peak + round((b.peak - a.peak) / (long - short) * (here - long))

    def most_tokens(self, shape: Shape, limit: int) -> int:
        """About how many tokens one row may have within `limit`, as the engine is set; 0 where nothing fits."""

        def peak(length: int) -> int:
            return self.forecast(shape.row(length)).peak

        def further(length: int) -> float:
            return float(length**self.power)

        length = shape.length
        while (here := peak(length)) > limit:
            if length <= SHORTEST:
                return 0
            length //= 2
        smaller = max(length // 2, 8)
        slope = 0.0
        if smaller < length:
            slope = (here - peak(smaller)) / (further(length) - further(smaller))
        if length < shape.length:  # between the one that fits and its double, which does not
            slope = max(slope, (peak(2 * length) - here) / (further(2 * length) - further(length)))
        while slope <= 0 and length < GROWS:  # so few tokens that something else makes the peak
            longer = peak(2 * length)
            if longer > limit:
                return length
            slope = (longer - here) / (further(2 * length) - further(length))
            here, length = longer, 2 * length
        if slope <= 0:
            return length

        def told() -> int:
            return int((further(length) + (limit - here) / slope) ** (1 / self.power))

        if told() > length * BEYOND:  # memory does not grow by the same with every token
            longer = min(told(), 2 * length)
            slope = max(slope, (peak(longer) - here) / (further(longer) - further(length)))
        return told()

    def _account(self, batch: Batch, gradients: bool) -> Account:
        found = self.engine.account(self.objective, batch, mx.random.key(0), gradients=gradients)
        return one_graph(self.engine, self.objective, batch, gradients) if found is None else found


@dataclass(frozen=True)
class Outlook:
    """How long a run will take.

    tokens: of all its steps, padding left out
    """

    tokens: int
    tokens_per_second: float
    seconds: float


def outlook(
    feed: Feed, held_out: Feed | None, forecast: Forecast, steps: int, validations: int, frozen_kept: float = 0.0
) -> Outlook:
    """How long `steps` steps over `feed` take, and so many validations, at the pace of the probed batches.

    frozen_kept: the share of what frozen blocks make of the texts that is computed once (`Engine.frozen_kept`)
    """
    tokens = int(feed.dataset.lengths.sum())
    plan = feed.plan(0)
    epoch = computed_of(plan, feed.dataset, forecast.unpadded)
    share = steps * forecast.accumulate / max(len(epoch), 1)
    first = min(share, tokens / max(int(plan.filled(feed.dataset.lengths).sum()), 1))  # in epochs; an epoch may repeat
    spared = frozen_kept * (share - first) * forecast.frozen_seconds
    seconds = int(epoch.sum()) * (share * forecast.seconds - spared) / (forecast.computed * forecast.accumulate)
    seconds += steps * forecast.update_seconds
    speed = tokens * share / max(seconds, 1e-9)
    if held_out is not None:
        batches = computed_of(held_out.plan(0), held_out.dataset, forecast.unpadded)
        seconds += validations * forecast.validation_seconds * int(batches.sum()) / max(int(batches.max()), 1)
    return Outlook(round(tokens * share), speed, seconds)


def scaled(account: Account, by: float, slower: float) -> Account:
    """The account of a batch that takes so many times as much memory and time."""
    return Account(
        round(account.peak * by), round(account.few * by), round(account.by_loss * by), account.seconds * slower,
        account.frozen * slower,
    )  # fmt: skip
