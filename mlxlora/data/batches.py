"""Samples into batches: an epoch planned ahead, and one batch put together.

Both are pure: the plan of an epoch follows from lengths, options, seed and epoch, so a resumed run needs only the epoch
and the position in it.

B  rows of a batch          T  length of its rows
P  positions that predict a weighted token, padded to a few fixed sizes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlxlora.data.config import BatchConfig
from mlxlora.data.cut import FINE, PADDING, cut, row_lengths
from mlxlora.data.sample import Batch, Sample

IntArray = npt.NDArray[np.int32]
LongArray = npt.NDArray[np.int64]

GRAIN = 8  # lengths of packed rows are multiples of this
POOL = 256  # batches whose samples are sorted by length together
JITTER = 0.015  # of lengths by which a small set is sorted
POSITION_GRAIN = 64  # smallest size of P, and what its sizes are multiples of


@dataclass(frozen=True, slots=True)
class Planned:
    """One batch before it is put together.

    rows:   the samples of each row (several where rows are packed)
    length: T, to which each row is padded
    """

    rows: tuple[tuple[int, ...], ...]
    length: int

    @property
    def samples(self) -> tuple[int, ...]:
        """All samples, row by row."""
        return tuple(sample for row in self.rows for sample in row)


class EpochPlan(Sequence[Planned]):
    """The batches of one epoch, kept in flat arrays: a million samples take a few bytes each."""

    def __init__(self, order: IntArray, row_ends: LongArray, batch_ends: LongArray, lengths: IntArray) -> None:
        """order: samples, row after row; row_ends: [rows] ends in `order`; batch_ends: [batches] ends in `row_ends`."""
        self._order, self._row_ends, self._batch_ends, self._lengths = order, row_ends, batch_ends, lengths

    def __len__(self) -> int:
        """How many batches the epoch has."""
        return len(self._batch_ends)

    def __getitem__(self, position: int) -> Planned:  # type: ignore[override]
        """The batch at `position`."""
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        position %= len(self)
        first = int(self._batch_ends[position - 1]) if position else 0
        rows = []
        for row in range(first, int(self._batch_ends[position])):
            begin = int(self._row_ends[row - 1]) if row else 0
            rows.append(tuple(int(i) for i in self._order[begin : int(self._row_ends[row])]))
        return Planned(tuple(rows), int(self._lengths[position]))

    @property
    def rows(self) -> LongArray:
        """Rows of each batch."""
        return np.diff(np.concatenate([np.zeros(1, np.int64), self._batch_ends]))

    @property
    def sizes(self) -> LongArray:
        """Tokens of each batch, padding included."""
        return self.rows * self._lengths

    def filled(self, lengths: IntArray) -> LongArray:
        """Tokens of each batch, padding left out, of samples with these lengths."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64)[self._order])])
        rows = np.concatenate([np.zeros(1, np.int64), self._row_ends])
        bounds = np.concatenate([np.zeros(1, np.int64), self._batch_ends])
        filled: LongArray = np.diff(ends[rows[bounds]])
        return filled

    @property
    def tokens(self) -> int:
        """Tokens of all batches, padding included."""
        return int(self.sizes.sum())

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """The distinct (B, T) of the epoch."""
        return {(int(b), int(t)) for b, t in zip(self.rows, self._lengths, strict=True)}


def plan_epoch(
    lengths: IntArray,
    config: BatchConfig,
    *,
    seed: int,
    epoch: int,
    repeats: npt.NDArray[np.float32] | None = None,
    shuffle: bool = True,
) -> EpochPlan:
    """Plan one epoch: every sample once (or as often as `repeats` says), nothing dropped.

    lengths: int32 [N]; tokens of each sample
    repeats: float32 [N]; how often a sample is seen in an epoch: 2 is twice, 0.5 every other epoch, at random

    Deterministic in its arguments. With `shuffle=False` the order is by length, the same in every epoch (validation).
    """
    lengths = np.asarray(lengths, np.int64).astype(np.int32)
    random = np.random.default_rng([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch])
    order = _occurrences(len(lengths), repeats, random)
    if shuffle:
        random.shuffle(order)
    if config.packing:
        plan = _pack(order, lengths, config, random if shuffle else None)
    else:
        plan = _group(order, lengths, config, random if shuffle else None)
    return plan


def _occurrences(count: int, repeats: npt.NDArray[np.float32] | None, random: np.random.Generator) -> IntArray:
    if repeats is None:
        return np.arange(count, dtype=np.int32)
    whole = np.floor(repeats).astype(np.int64)
    extra = random.random(count) < repeats - whole
    return np.repeat(np.arange(count, dtype=np.int32), whole + extra)


def _group(order: IntArray, lengths: IntArray, config: BatchConfig, random: np.random.Generator | None) -> EpochPlan:
    """Rows of one sample. Sorted by length within pools, so that the rows of a batch are about equally long."""
    average = max(1, int(lengths.mean())) if len(lengths) else 1
    rows = config.batch_size if config.tokens_per_batch is None else max(1, config.tokens_per_batch // average)
    pool = rows * POOL if random is not None else max(1, len(order))
    # pools of equal size, so that no small one is left over at the end with rows of very different length
    pools = np.array_split(order, max(1, round(len(order) / pool)))
    few = len(order) <= rows * config.lengths  # batches: most can have a length of their own
    grid = row_lengths(lengths, config.lengths, padding=FINE if few else PADDING)
    padded = grid[np.searchsorted(grid, lengths)] if len(lengths) else lengths
    ends: list[int] = []
    sorted_order = np.empty_like(order)
    begin = 0
    for part in pools:
        # rows that are padded to one length change places from epoch to epoch; of few rows, hardly any are, and the
        # same would always share a batch
        noise = random.normal(0, JITTER, len(part)) if few and random is not None else 0.0
        chosen = part[np.argsort(padded[part] * np.exp(noise), kind="stable")]
        sorted_order[begin : begin + len(part)] = chosen
        ends += [begin + end for end in cut(padded[chosen], int(lengths[chosen].sum()), config)]
        begin += len(part)
    batch_ends = np.array(ends, np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), batch_ends[:-1]]) if len(ends) else batch_ends
    if random is None:
        turn = np.arange(len(ends))
    else:
        turn = random.permutation(len(ends))
    final = [sorted_order[starts[i] : batch_ends[i]] for i in turn]
    flat = np.concatenate([np.zeros(0, np.int32), *final])
    longest = np.array([padded[rows].max() for rows in final], np.int32)
    return EpochPlan(
        flat, np.arange(1, len(flat) + 1), np.cumsum([len(rows) for rows in final], dtype=np.int64), longest
    )


def _pack(order: IntArray, lengths: IntArray, config: BatchConfig, random: np.random.Generator | None) -> EpochPlan:
    """Rows of several samples: best fit, longest first, within pools of the shuffled order."""
    capacity = config.max_length
    total = int(lengths[order].sum()) if len(order) else 0
    if total:
        # as few rows as can be, evenly filled: the last one is not left half empty
        rows_needed = -(-total // capacity)
        even = -(-int(total / rows_needed * 1.01 + 1) // GRAIN) * GRAIN
        capacity = max(min(capacity, even), int(lengths[order].max()))
    rows_per_batch = (
        config.batch_size if config.tokens_per_batch is None else max(1, config.tokens_per_batch // capacity)
    )
    average = max(1.0, total / max(1, len(order)))
    pool = max(1, int(rows_per_batch * POOL * capacity / average))
    rows: list[list[int]] = []
    for part in np.array_split(order, max(1, round(len(order) / pool))):
        rows += _best_fit(part[np.argsort(-lengths[part], kind="stable")], lengths, capacity)
    turn = random.permutation(len(rows)) if random is not None else np.arange(len(rows))
    ordered = [rows[i] for i in turn]
    flat = np.array([sample for row in ordered for sample in row], np.int32)
    row_ends = np.cumsum([len(row) for row in ordered], dtype=np.int64)
    batch_ends = np.array(
        [*range(rows_per_batch, len(ordered), rows_per_batch), len(ordered)] if ordered else [], np.int64
    )
    return EpochPlan(flat, row_ends, batch_ends, np.full(len(batch_ends), capacity, np.int32))


def _best_fit(samples: IntArray, lengths: IntArray, capacity: int) -> list[list[int]]:
    """Put samples (longest first) each into the fullest row that has room for it."""
    room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by how many tokens are still free
    free = np.zeros(capacity + 1, bool)  # which of those lists are not empty
    rows: list[list[int]] = []
    for sample in samples:
        size = int(lengths[sample])
        fits = int(np.argmax(free[size:])) + size if size <= capacity else size
        if size <= capacity and free[fits]:
            row = room[fits].pop()
            free[fits] = bool(room[fits])
            left = fits - size
        else:
            row, left = len(rows), max(0, capacity - size)
            rows.append([])
        rows[row].append(int(sample))
        room[left].append(row)
        free[left] = True
    return rows


def position_count(count: int) -> int:
    """The padded size of P for `count` weighted positions: multiples of 64, and from 512 on eight sizes an octave."""
    step = POSITION_GRAIN
    while step * 16 <= count:
        step *= 2
    return max(POSITION_GRAIN, -(-count // step) * step)


def collate(dataset: Sequence[Sample], planned: Planned, *, pad_id: int = 0) -> Batch:
    """Put one planned batch together.

    Hidden state t of a row predicts token t + 1: `loss_positions` points at t, `targets` holds token t + 1. Positions
    that fill P up point at 0 and weigh 0.
    """
    B, T = len(planned.rows), planned.length
    packed = any(len(row) != 1 for row in planned.rows)
    tokens = np.full((B, T), pad_id, np.int32)
    weights = np.zeros((B, T), np.float32)
    segments = np.full((B, T), -1, np.int32)
    for row, samples in enumerate(planned.rows):
        begin = 0
        for number, index in enumerate(samples):
            sample = dataset[index]
            end = begin + len(sample.tokens)
            tokens[row, begin:end] = sample.tokens
            weights[row, begin:end] = sample.weights
            weights[row, begin] = 0.0  # nothing of the same document stands before its first token
            segments[row, begin:end] = number
            begin = end
    flat = np.flatnonzero(weights.reshape(-1))
    P = position_count(len(flat))
    positions, targets, kept = np.zeros(P, np.int32), np.zeros(P, np.int32), np.zeros(P, np.float32)
    positions[: len(flat)] = flat - 1
    targets[: len(flat)] = tokens.reshape(-1)[flat]
    kept[: len(flat)] = weights.reshape(-1)[flat]
    return Batch(
        tokens=mx.array(tokens),
        loss_positions=mx.array(positions),
        targets=mx.array(targets),
        weights=mx.array(kept),
        segments=mx.array(segments) if packed else None,
        samples=planned.samples,
    )
