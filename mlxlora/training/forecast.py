"""Will it fit, and how long will it take: an account of the step, calibrated by short real ones.

    peak = resident + max(step, update, validation)
    resident    weights, adapter, moments: what lies there between two steps; counted
    step        activations, loss, gradients: the engine's own account of its parts, block by block (engine/account.py)
    update      gradients and what the optimizer makes of them: measured on a part of the arrays, by proportion
    validation  the forward pass of the longest validation batch, by the engine's account

A model whose step is one graph has no parts: its step is a line through two steps with a few of its blocks in place,
or, where it cannot run without all of its blocks, a step of the whole.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxlora.adapters import block_paths
from mlxlora.adapters.inject import get_module, kept_aside
from mlxlora.data import Batch, BatchConfig, plan_epoch
from mlxlora.data.batches import EpochPlan, position_count
from mlxlora.data.dataset import Dataset
from mlxlora.data.feed import Feed
from mlxlora.engine import Engine, EngineConfig
from mlxlora.engine.account import Account
from mlxlora.engine.config import CheckpointBlocks
from mlxlora.engine.packing import computed
from mlxlora.parameters import Flat, bytes_of, flat
from mlxlora.training.optimizer import Optimizer, OptimizerConfig

FEW, MORE = 2, 4  # blocks in place in the two steps of a model whose step is one graph
SAMPLE = 1 << 26  # bytes of the arrays that the update is measured on
SHORTEST = 16  # tokens of a row
SMALL = 512  # tokens of a batch that is tried without asking whether it fits
LARGEST = 64  # batches that are looked at for the most learned tokens


@dataclass(frozen=True)
class Shape:
    """A batch.

    rows, length: with padding
    learned:      the share of its tokens, padding left out, that is learned
    documents:    in a row
    filled:       the share of it that is no padding
    """

    rows: int
    length: int
    learned: float
    documents: int = 1
    filled: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of the batch, padding included."""
        return self.rows * self.length

    @property
    def targets(self) -> int:
        """Tokens that are learned."""
        return max(1, round(self.learned * self.filled * self.tokens))

    def row(self, length: int) -> Shape:
        """One row of that length, all of it filled."""
        return replace(self, rows=1, length=length, filled=1.0)

    def part(self, of: int) -> Shape:
        """About one in `of` of its tokens: fewer rows, then shorter ones."""
        rows = max(1, self.rows // of)
        length = max(8, self.length * self.rows // (rows * of))
        return replace(self, rows=rows, length=min(length, self.length))


@dataclass(frozen=True)
class Forecast:
    """What training needs with batches of one shape, in bytes.

    weights, adapter, moments: what lies in memory between two steps; weights with all else that lies there now
    step, update, validation:  what comes on top, one after the other
    by_loss: what of the step is the loss alone, where it decides; else 0
    seconds: of one step, all of its micro-batches, without the update
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
    update_seconds: float = 0.0

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
        )

    def step(self, shape: Shape, *, gradients: bool = True) -> Account:
        """The account of one step. A batch too large to be tried within the limit is told by proportion to smaller."""
        room, config = self.limit - self.resident, self.engine.config
        size = partial(tokens_computed, unpadded=self.engine.leaves_out_padding)
        found: Account | None = None
        tokens = 0
        for now in ladder(shape):
            if found is not None and found.few * size(now) > room * tokens:
                return scaled(found, size(shape) / tokens)
            key = (now, config.checkpoint_blocks, config.loss_chunk, gradients)
            if key not in self._known:
                self._known[key] = self._account(synthetic(now, self.vocabulary), gradients)
            found, tokens = self._known[key], size(now)
        assert found is not None
        return found

    def most_tokens(self, shape: Shape, limit: int) -> int:
        """About how many tokens one row may have within `limit`, as the engine is set; 0 where nothing fits."""

        def peak(length: int) -> int:
            return self.forecast(shape.row(length)).peak

        length = shape.length
        while (here := peak(length)) > limit:
            if length <= SHORTEST:
                return 0
            length //= 2
        smaller = max(length // 2, 8)
        slope = (here - peak(smaller)) / max(length - smaller, 1) if length < shape.length or length > 8 else 0.0
        if length < shape.length:  # between the one that fits and its double, which does not
            slope = max(slope, (peak(2 * length) - here) / length)
        return length + int((limit - here) / slope) if slope > 0 else length

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


def outlook(feed: Feed, held_out: Feed | None, forecast: Forecast, steps: int, validations: int) -> Outlook:
    """How long `steps` steps over `feed` take, and so many validations, at the pace of the probed batches."""
    tokens = int(feed.dataset.lengths.sum())
    epoch = computed_of(feed.plan(0), feed.dataset, forecast.unpadded)
    share = steps * forecast.accumulate / max(len(epoch), 1)
    seconds = int(epoch.sum()) * share * forecast.seconds / (forecast.computed * forecast.accumulate)
    seconds += steps * forecast.update_seconds
    speed = tokens * share / max(seconds, 1e-9)
    if held_out is not None:
        batches = computed_of(held_out.plan(0), held_out.dataset, forecast.unpadded)
        seconds += validations * forecast.validation_seconds * int(batches.sum()) / max(int(batches.max()), 1)
    return Outlook(round(tokens * share), speed, seconds)


def tokens_computed(shape: Shape, unpadded: bool) -> int:
    """Tokens of a batch of that shape that are computed, where padding may be left out (or not)."""
    return int(computed(round(shape.filled * shape.tokens), shape.tokens)) if unpadded else shape.tokens


def computed_of(plan: EpochPlan, dataset: Dataset, unpadded: bool) -> npt.NDArray[np.int64]:
    """The same of each batch of an epoch."""
    return computed(plan.filled(dataset.lengths), plan.sizes) if unpadded else plan.sizes


def ladder(shape: Shape) -> list[Shape]:
    """Shapes to try on the way up to `shape`, so that the last is known to be safe from those before it."""
    found = [shape]
    while found[0].tokens > SMALL and (smaller := found[0].part(4)).tokens < found[0].tokens:
        found.insert(0, smaller)
    return found


def scaled(account: Account, by: float) -> Account:
    """The account of a batch so many times as large."""
    return Account(round(account.peak * by), round(account.few * by), round(account.by_loss * by), account.seconds * by)


def largest(dataset: Dataset, config: BatchConfig, *, unpadded: bool, seed: int = 0, shuffle: bool = True) -> Shape:
    """The largest batch of the first epoch, and the most tokens that are learned in any of about that size."""
    plan = plan_epoch(dataset.lengths, config, seed=seed, epoch=0, repeats=dataset.repeats, shuffle=shuffle)
    unpadded = unpadded and not config.packing  # packed rows are computed as they are
    sizes = computed_of(plan, dataset, unpadded)
    largest = int(np.argmax(sizes))
    rows, tokens = int(plan.rows[largest]), int(plan.filled(dataset.lengths)[largest])
    learned, documents = 0, 1
    for position in np.flatnonzero(sizes >= 0.95 * sizes[largest])[:LARGEST]:
        planned = plan[int(position)]
        learned = max(learned, int(dataset.trained[list(planned.samples)].sum()))
        documents = max(documents, round(len(planned.samples) / len(planned.rows)))
    length = plan[largest].length
    return Shape(rows, length, min(learned / max(tokens, 1), 1.0), documents, tokens / (rows * length))


def synthetic(shape: Shape, vocabulary: int) -> Batch:
    """A batch of random tokens of that shape: one row of the full length, the others share what is left."""
    random = np.random.default_rng(0)
    rows, length = shape.rows, shape.length
    tokens = random.integers(0, vocabulary, (rows, length)).astype(np.int32)
    filled = max(round(shape.filled * shape.tokens), 2 * rows)
    others = np.diff(np.linspace(0, max(filled - length, 2 * (rows - 1)), rows).round().astype(np.int64))
    lengths = np.concatenate([[min(filled, length)], others])
    inside = np.concatenate([row * length + np.arange(size - 1) for row, size in enumerate(lengths)])
    ends = np.arange(rows) * length + lengths - 2  # a row ends where something is learned last
    between = np.setdiff1d(inside, ends)
    count = min(max(shape.targets, rows), len(inside))
    places = np.sort(np.concatenate([ends, random.permutation(between)[: count - rows]]))
    positions = np.zeros(position_count(count), np.int32)
    positions[:count] = places
    targets = tokens.reshape(-1)[positions + 1]
    segments = None
    if shape.documents > 1:
        segments = mx.array(np.tile(np.arange(length) * shape.documents // length, (rows, 1)).astype(np.int32))
    weights = mx.array((np.arange(len(positions)) < count).astype(np.float32))
    batch = Batch(mx.array(tokens), mx.array(positions), mx.array(targets), weights, segments)
    mx.eval(batch.tokens, batch.loss_positions, batch.targets, batch.weights)
    return batch


def above(work: Callable[[], Any]) -> tuple[int, float]:
    """(bytes, seconds): what `work` needs at its peak beside what lies there already, and how long it takes."""
    mx.synchronize()
    mx.reset_peak_memory()
    before, begun = mx.get_active_memory(), time.perf_counter()
    mx.eval(work())
    seconds = time.perf_counter() - begun
    return max(mx.get_peak_memory() - before, 0), seconds


def update_needs(config: OptimizerConfig, parameters: Flat) -> tuple[int, float]:
    """(bytes, seconds): what an update needs beside parameters and moments, the gradient included, and its time.

    Measured on as many arrays, all smaller by one factor: how many are under way at a time is a matter of their number.
    """
    size = bytes_of(parameters)
    if not size:
        return 0, 0.0
    factor = -(-size // SAMPLE)
    own = {
        name: mx.zeros((-(-value.shape[0] // factor), *value.shape[1:]) if value.ndim else (), value.dtype)
        for name, value in parameters.items()
    }
    optimizer = Optimizer(config, 1)
    optimizer.init(own)
    mx.eval(own)

    def update() -> Any:
        nonlocal own
        gradients = {name: mx.zeros_like(value) for name, value in own.items()}
        mx.eval(gradients)
        own, norm, finite = optimizer.update(own, gradients, mx.array(0.0), mx.array(1.0), 0)
        del gradients
        return own, optimizer.state, norm, finite

    found = [above(update) for _ in range(2)]  # the first one compiles
    scale = size / bytes_of(own)
    return round(max(most for most, _ in found) * scale), found[-1][1] * scale


# ---- a step that is one graph --------------------------------------------------------------------------------------


def one_graph(engine: Engine, objective: Any, batch: Batch, gradients: bool) -> Account:
    """The account of a step that has no parts: by a line through steps with a few of the blocks in place."""
    network, config = engine.network, replace(engine.config, frozen_cache=0.0)
    blocks = _running(network)
    if blocks <= MORE:
        return _whole(network, config, objective, batch, gradients)
    try:
        with only_last(network, FEW):
            few = _whole(network, config, objective, batch, gradients)
        with only_last(network, MORE):
            more = _whole(network, config, objective, batch, gradients)
    except (IndexError, ValueError, AttributeError, TypeError, KeyError):
        return _whole(network, config, objective, batch, gradients)  # its forward pass needs all of its blocks
    times = (blocks - MORE) / (MORE - FEW)
    return Account(
        peak=more.peak + round(max(more.peak - few.peak, 0) * times),
        few=more.few,
        by_loss=0,
        seconds=more.seconds + max(more.seconds - few.seconds, 0.0) * times,
    )


def _running(network: nn.Module) -> int:
    """How many blocks have a backward pass: all from the first that learns."""
    paths = block_paths(network)
    learned = list(flat(network.trainable_parameters()))
    inside = [any(name.startswith(f"{path}.") for name in learned) for path in paths]
    outside = any(not any(name.startswith(f"{path}.") for path in paths) for name in learned)
    return len(paths) if outside or not any(inside) else len(paths) - inside.index(True)


def _whole(network: nn.Module, config: EngineConfig, objective: Any, batch: Batch, gradients: bool) -> Account:
    engine = Engine(network, config)

    def step() -> Any:
        if not gradients:
            return engine.evaluate(objective, batch)
        return engine.value_and_grad(objective, batch, mx.random.key(0))

    try:
        compiling, _ = above(step)
        size, seconds = above(step)
    finally:
        engine.close()
    return Account(max(compiling, size), max(compiling, size), 0, seconds)


@contextlib.contextmanager
def only_last(network: nn.Module, count: int) -> Iterator[None]:
    """Within the block, the network has only its last `count` blocks: where only some learn, it is those."""
    path = block_paths(network)[0].rsplit(".", 1)[0]
    owner = get_module(network, path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    whole = owner[name]
    try:
        owner[name] = list(whole)[-count:]
        yield
    finally:
        owner[name] = whole
