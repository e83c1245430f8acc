"""Will it fit, and how long will it take: an account of the step's memory, calibrated by two small real steps.

    peak = resident + max(step, update)
    resident   weights, adapter, moments: what lies there between two steps; counted
    step       activations, loss, gradients: fixed + per_block × blocks; a line through two steps on batches of the true
               shape with only a few blocks of the model in place
    update     what the optimizer needs beside that; measured

The step is computed block by block, so its memory and its time are lines in the number of blocks, whatever the length
of the rows does inside a block. A model that cannot run with fewer blocks is probed whole.

L  blocks of the model          n  tokens of a batch, padding included
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxlora.adapters import block_paths
from mlxlora.adapters.inject import get_module
from mlxlora.data import Batch, BatchConfig, plan_epoch
from mlxlora.data.dataset import Dataset
from mlxlora.engine import Engine, EngineConfig
from mlxlora.engine.config import CheckpointBlocks
from mlxlora.errors import UnsupportedError
from mlxlora.files import human_bytes
from mlxlora.parameters import Flat, bytes_of, flat
from mlxlora.training.optimizer import Optimizer

FEW, MORE = 2, 4  # blocks in place in the two probes
WORKSPACE = 256_000_000  # bytes; more than the chunks of attention and loss take beside what grows with the batch
LOSS_ARRAYS, LOSS_TOKENS = 6, 256  # at most so many arrays of logits, for so many tokens, exist at a time
GRADES: tuple[CheckpointBlocks, ...] = ("products", "inputs")  # fastest first


@dataclass(frozen=True)
class Shape:
    """The largest batch of a run: rows, their length, and the share of its tokens that is learned."""

    rows: int
    length: int
    learned: float

    @property
    def tokens(self) -> int:
        """Tokens of the batch, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Forecast:
    """What training needs with batches of one shape, in bytes, under one way of checkpointing.

    weights, adapter, moments: what lies in memory between two steps; weights with all else that lies there now
    step:    activations, loss and gradients at their peak
    update:  what the optimizer's update needs
    seconds: of one step on this shape
    """

    checkpoint_blocks: CheckpointBlocks
    shape: Shape
    weights: int
    adapter: int
    moments: int
    step: int
    update: int
    seconds: float

    @property
    def resident(self) -> int:
        """What lies in memory between two steps."""
        return self.weights + self.adapter + self.moments

    @property
    def peak(self) -> int:
        """The most that will be in use."""
        return self.resident + max(self.step, self.update)

    def at(self, tokens: int) -> int:
        """The peak with batches of `tokens`, by proportion: what a step keeps grows with its tokens."""
        return self.resident + max(round(self.step * tokens / self.shape.tokens), self.update)

    def most_tokens(self, limit: int) -> int:
        """About how many tokens a batch may have under `limit`; 0 where nothing fits."""
        room = limit - self.resident
        return int(room / max(self.step, 1) * self.shape.tokens) if room > self.update else 0


def largest(dataset: Dataset, config: BatchConfig, *, seed: int = 0) -> Shape:
    """The largest batch of the first epoch, and the share of learned tokens in it."""
    plan = plan_epoch(dataset.lengths, config, seed=seed, epoch=0, repeats=dataset.repeats)
    shapes = sorted(plan.shapes, key=lambda shape: shape[0] * shape[1])
    rows, length = shapes[-1]
    learned = float(dataset.trained.sum()) / max(float(dataset.lengths.sum()), 1.0)
    return Shape(int(rows), int(length), learned)


def synthetic(rows: int, length: int, learned: float, vocabulary: int) -> Batch:
    """A batch of random tokens of that shape."""
    random = np.random.default_rng(0)
    tokens = random.integers(0, vocabulary, (rows, length)).astype(np.int32)
    flat = np.sort(random.permutation(rows * (length - 1))[: max(1, round(learned * rows * length))])
    positions = (flat // (length - 1) * length + flat % (length - 1)).astype(np.int32)
    targets = tokens.reshape(-1)[positions + 1]
    return Batch(mx.array(tokens), mx.array(positions), mx.array(targets), mx.ones(len(positions)))


def above(work: Callable[[], Any]) -> tuple[int, float]:
    """(bytes, seconds): what `work` needs at its peak beside what lies there already, and how long it takes."""
    mx.synchronize()
    mx.reset_peak_memory()
    before, begun = mx.get_active_memory(), time.perf_counter()
    result = work()
    mx.eval(result)
    seconds = time.perf_counter() - begun
    del result
    return max(mx.get_peak_memory() - before, 0), seconds


def forecast(
    network: nn.Module,
    config: EngineConfig,
    optimizer: Optimizer,
    objective: Any,
    shape: Shape,
    *,
    vocabulary: int,
    accumulate: int = 1,
) -> Forecast:
    """Probe this model under one way of checkpointing. Network and optimizer stay as they are."""
    parameters = flat(network.trainable_parameters())
    trainable = bytes_of(parameters)
    mx.eval(network.parameters(), optimizer.state)
    every = mx.get_active_memory()
    moments = bytes_of(optimizer.state)
    batch = synthetic(shape.rows, shape.length, shape.learned, vocabulary)
    mx.eval(batch.tokens, batch.loss_positions, batch.targets, batch.weights)
    step, seconds = extrapolated(network, config, objective, batch)
    more = trainable if accumulate > 1 else 0  # the sum so far, beside the gradient of a micro-batch
    return Forecast(
        checkpoint_blocks=config.checkpoint_blocks,
        shape=shape,
        weights=every - trainable - moments,
        adapter=trainable,
        moments=moments,
        step=step + more,
        update=update_bytes(optimizer, parameters) + more,
        seconds=seconds * accumulate,
    )


def extrapolated(network: nn.Module, config: EngineConfig, objective: Any, batch: Batch) -> tuple[int, float]:
    """(bytes, seconds) of a step, by a line through steps with a few blocks in place."""
    blocks = len(block_paths(network))
    if blocks <= MORE:
        return probe(network, config, objective, batch)
    try:
        with only_blocks(network, FEW):
            few = probe(network, config, objective, batch)
        with only_blocks(network, MORE):
            more = probe(network, config, objective, batch)
    except (IndexError, ValueError, AttributeError, TypeError, KeyError):
        return probe(network, config, objective, batch)  # its forward pass needs all of its blocks

    def line(a: float, b: float) -> float:
        return b + max(b - a, 0.0) * (blocks - MORE) / (MORE - FEW)

    return round(line(few[0], more[0])), line(few[1], more[1])


def probe(network: nn.Module, config: EngineConfig, objective: Any, batch: Batch) -> tuple[int, float]:
    """(bytes, seconds) of one step of the network as it stands."""
    engine = Engine(network, config)

    def step() -> Any:
        total, count, _, gradients = engine.value_and_grad(objective, batch, mx.random.key(0))
        return total, count, gradients

    try:
        compiling, _ = above(step)
        size, seconds = above(step)
        return max(
            compiling, size
        ), seconds  # how far the device lags behind is chance, and with it what lies in memory
    finally:
        engine.close()


@contextlib.contextmanager
def only_blocks(network: nn.Module, count: int) -> Iterator[None]:
    """Within the block, the network has only its first `count` blocks."""
    path = block_paths(network)[0].rsplit(".", 1)[0]
    owner = get_module(network, path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    whole = owner[name]
    try:
        owner[name] = list(whole)[:count]
        yield
    finally:
        owner[name] = whole


def update_bytes(optimizer: Optimizer, parameters: Flat) -> int:
    """What an update needs beside parameters and moments, the gradient included."""
    zeros = {name: mx.zeros_like(value) for name, value in parameters.items()}
    mx.eval(zeros)
    state = optimizer.state

    def update() -> Any:
        new, norm, finite = optimizer.update(parameters, zeros, mx.array(0.0), mx.array(1.0), 0)
        changed, optimizer.state = optimizer.state, state
        return new, norm, finite, changed

    return above(update)[0] + bytes_of(zeros)


def settle(
    network: nn.Module,
    optimizer: Optimizer,
    objective: Any,
    shape: Shape,
    blocks: CheckpointBlocks,
    limit: int,
    *,
    vocabulary: int,
    accumulate: int = 1,
) -> tuple[CheckpointBlocks, int]:
    """(checkpointing, predicted peak): the fastest way that fits, or the one asked for.

    Where even a generous bound fits, nothing is probed and the bound is the prediction.
    Raises UnsupportedError, saying what would fit, when none does.
    """
    parameters = flat(network.trainable_parameters())
    if not optimizer.state:
        optimizer.init(parameters)
    bound = generous_bound(network, optimizer, shape, vocabulary)
    wanted = GRADES if blocks == "auto" else (blocks,)
    if bound <= limit and "none" not in wanted:
        return wanted[0], bound
    for grade in wanted:
        found = forecast(
            network, EngineConfig(checkpoint_blocks=grade), optimizer, objective, shape,
            vocabulary=vocabulary, accumulate=accumulate,
        )  # fmt: skip
        if found.peak <= limit:
            return grade, found.peak
    raise UnsupportedError(
        f"This run will not fit: it needs about {human_bytes(found.peak)}, and the limit is {human_bytes(limit)}. "
        f"{advice(found, limit)} `mlxlora plan` with the same options shows what else would."
    )


def generous_bound(network: nn.Module, optimizer: Optimizer, shape: Shape, vocabulary: int) -> int:
    """More than a step can need: three times the outputs of all its matrix products, kept in float32."""
    blocks = block_paths(network)
    widths, hidden = 0, 0
    for path in blocks:
        for name, value in flat(get_module(network, path).parameters()).items():
            if value.ndim >= 2 and name.rpartition(".")[2] == "weight":
                widths += math.prod(value.shape[:-1])
            hidden = max(hidden, value.shape[0] if value.ndim == 1 else 0)
    step = 4 * shape.tokens * (3 * widths + 24 * hidden * len(blocks)) + WORKSPACE
    loss = 4 * LOSS_ARRAYS * vocabulary * min(shape.tokens, LOSS_TOKENS)
    trained = bytes_of(network.trainable_parameters())
    resident = bytes_of(network.parameters())
    return resident + bytes_of(optimizer.state) + step + loss + 8 * trained


def advice(smallest: Forecast, limit: int) -> str:
    """What would make a run fit that does not."""
    most, length = smallest.most_tokens(limit), smallest.shape.length
    if most >= length:
        return f"Batches of {most:,} tokens would: --training.tokens_per_batch {most // length * length}."
    if most >= 64:
        return f"Rows of {most:,} tokens, one a batch, would: --samples.max_length {most} --training.batch_size 1."
    return (
        f"The model alone takes {human_bytes(smallest.resident)}. Take a smaller one, or quantize it: "
        "mlxlora convert --quantize.bits 4."
    )
