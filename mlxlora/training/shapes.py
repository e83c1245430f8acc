"""Batches by their shape: the largest one of the data, smaller ones like it, and random tokens of that shape."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxlora.data import Batch, BatchConfig, plan_epoch
from mlxlora.data.batches import EpochPlan, position_count
from mlxlora.data.dataset import Dataset
from mlxlora.engine.packing import computed

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


def largest(dataset: Dataset, config: BatchConfig, *, unpadded: bool, seed: int = 0, shuffle: bool = True) -> Shape:
    """The largest batch of the first epoch, and the most tokens that are learned in any of about that size."""
    plan = plan_epoch(dataset.lengths, config, seed=seed, epoch=0, repeats=dataset.repeats, shuffle=shuffle)
    unpadded = unpadded and not config.packing  # packed rows are computed as they are
    sizes = computed_of(plan, dataset, unpadded)
    most = int(np.argmax(sizes))
    rows, tokens = int(plan.rows[most]), int(plan.filled(dataset.lengths)[most])
    learned, documents = 0, 1
    for position in np.flatnonzero(sizes >= 0.95 * sizes[most])[:LARGEST]:
        planned = plan[int(position)]
        learned = max(learned, int(dataset.trained[list(planned.samples)].sum()))
        documents = max(documents, round(len(planned.samples) / len(planned.rows)))
    length = plan[most].length
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
