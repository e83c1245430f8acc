"""Planning and collating: every row once, little padding, few shapes, documents kept apart."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxlora.data import BatchConfig, SamplesConfig, collate, from_rows, plan_epoch
from mlxlora.data.batches import EpochPlan, Planned, position_count
from mlxlora.data.cut import best_cut, row_lengths
from mlxlora.tokenizer import Tokenizer

CONFIGS = [
    BatchConfig(batch_size=1), BatchConfig(batch_size=4), BatchConfig(batch_size=7),
    BatchConfig(tokens_per_batch=500), BatchConfig(packing=True, max_length=300),
    BatchConfig(packing=True, max_length=300, tokens_per_batch=1000),
]  # fmt: skip


def log_normal(count: int, seed: int = 0) -> np.ndarray:
    return np.clip(np.random.default_rng(seed).lognormal(5.3, 0.7, count), 8, 2048).astype(np.int32)


@given(st.lists(st.integers(1, 300), max_size=120), st.sampled_from(CONFIGS), st.integers(0, 2**40), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_every_row_once_and_room_for_all(lengths: list[int], config: BatchConfig, seed: int, epoch: int) -> None:
    sizes = np.array(lengths, np.int32)
    plan = plan_epoch(sizes, config, seed=seed, epoch=epoch)
    assert plan.filled(sizes).tolist() == [int(sizes[list(batch.samples)].sum()) for batch in plan]
    assert sorted(sample for planned in plan for sample in planned.samples) == list(range(len(lengths)))
    for planned in plan:
        assert planned.rows
        for row in planned.rows:
            assert row and sum(lengths[sample] for sample in row) <= planned.length
            assert config.packing or len(row) == 1
        if config.tokens_per_batch is None:
            assert len(planned.rows) <= config.batch_size
        elif not config.packing:
            assert len(planned.rows) == 1 or len(planned.rows) * planned.length <= config.tokens_per_batch


def batches(plan: EpochPlan) -> list[Planned]:
    return list(plan)


@pytest.mark.parametrize("config", CONFIGS)
def test_epochs_differ_and_repeat_exactly(config: BatchConfig) -> None:
    lengths = log_normal(100) // 8 + 1
    one, again, next_one = (plan_epoch(lengths, config, seed=5, epoch=epoch) for epoch in (0, 0, 1))
    assert batches(one) == batches(again)
    assert batches(one) != batches(next_one)
    assert {frozenset(p.samples) for p in one} != {frozenset(p.samples) for p in next_one} or config.batch_size == 1


def test_batches_do_not_come_by_length() -> None:
    lengths = log_normal(2000)
    order = [planned.length for planned in plan_epoch(lengths, BatchConfig(), seed=0, epoch=0)]
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.15


@pytest.mark.parametrize(
    ("count", "config"),
    [
        *itertools.product((200, 400, 1000, 2000, 20_000), (BatchConfig(), BatchConfig(batch_size=8))),
        *itertools.product((200, 400, 1000, 2000), (BatchConfig(batch_size=2), BatchConfig(tokens_per_batch=2048))),
        *itertools.product((1000, 2000, 20_000), (BatchConfig(batch_size=16), BatchConfig(tokens_per_batch=4096))),
    ],
)
def test_padding_stays_below_five_percent(count: int, config: BatchConfig) -> None:
    for seed in range(3):
        lengths = log_normal(count, seed)
        plan = plan_epoch(lengths, config, seed=seed, epoch=seed)
        assert 1 - lengths.sum() / plan.tokens < 0.05
        assert len({length for _, length in plan.shapes}) <= 64 and len(plan.shapes) <= 80
        if config.tokens_per_batch is None:
            least = -(-count // config.batch_size)
            assert least <= len(plan) <= least * 9 / 8 + 1


def test_where_rows_are_alike_no_batch_is_added() -> None:
    for count in (10, 57, 200, 1000):
        lengths = np.random.default_rng(0).integers(100, 104, count).astype(np.int32)
        assert len(plan_epoch(lengths, BatchConfig(), seed=0, epoch=0)) == -(-count // 4)


@pytest.mark.parametrize(
    ("count", "config", "most"),
    [(100, BatchConfig(), 0.75), (200, BatchConfig(batch_size=8), 0.75), (1000, BatchConfig(), 0.2),
     (5000, BatchConfig(), 0.05), (400, BatchConfig(tokens_per_batch=2048), 0.7)],
)  # fmt: skip
def test_rows_meet_others_in_the_next_epoch(count: int, config: BatchConfig, most: float) -> None:
    def pairs(epoch: int) -> set[tuple[int, int]]:
        plan = plan_epoch(log_normal(count), config, seed=0, epoch=epoch)
        return {pair for planned in plan for pair in itertools.combinations(sorted(planned.samples), 2)}

    assert len(pairs(0) & pairs(1)) < most * len(pairs(0))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(1, 4), st.one_of(st.none(), st.integers(8, 150))
)
@settings(max_examples=100, deadline=None)
def test_thebest_cut_is_the_best(lengths: list[int], rows: int, limit: int | None) -> None:
    padded, config = np.array(lengths, np.int32), BatchConfig(batch_size=rows, tokens_per_batch=limit)

    def cost(ends: tuple[int, ...]) -> float:
        total = 0
        for begin, end in itertools.pairwise([0, *ends, len(lengths)]):
            spent = (end - begin) * max(lengths[begin:end])
            if end - begin > 1 and (end - begin > rows if limit is None else spent > limit):
                return np.inf
            total += spent
        return total

    inner = range(1, len(lengths))
    costs = [min(map(cost, itertools.combinations(inner, count - 1))) for count in range(1, len(lengths) + 1)]
    for most in range(1, len(lengths) + 1):
        if np.isfinite(costs[most - 1]):
            assert cost(tuple(best_cut(padded, config, most, 0)[:-1])) == costs[most - 1]
    for enough in (sum(lengths), 2 * sum(lengths), 3 * sum(lengths)):
        ends = best_cut(padded, config, len(lengths), enough)
        assert len(ends) == next((n for n, spent in enumerate(costs, 1) if spent <= enough), len(lengths))


def test_packing_wastes_next_to_nothing() -> None:
    lengths = log_normal(5000)
    plan = plan_epoch(lengths, BatchConfig(packing=True), seed=0, epoch=0)
    assert 1 - lengths.sum() / plan.tokens < 0.005
    assert len(plan.shapes) <= 2


def test_a_sample_longer_than_a_packed_row_makes_the_rows_longer() -> None:
    plan = plan_epoch(np.array([500, 20, 30], np.int32), BatchConfig(packing=True, max_length=100), seed=0, epoch=0)
    assert {planned.length for planned in plan} == {500}


def test_validation_order_is_the_same_in_every_epoch() -> None:
    lengths = log_normal(300)
    plans = [plan_epoch(lengths, BatchConfig(), seed=seed, epoch=seed, shuffle=False) for seed in (0, 1)]
    assert batches(plans[0]) == batches(plans[1])


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=200), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_row_lengths_hold_every_sample_and_are_the_best(lengths: list[int], count: int) -> None:
    sizes = np.array(lengths, np.int32)
    found = row_lengths(sizes, count, padding=0.0)
    assert len(found) <= count and found.max() >= sizes.max() and (np.diff(found) > 0).all()
    if count <= 2 and sizes.max() <= 512:
        cost = found[np.searchsorted(found, sizes)].sum()
        best = min(
            np.where(sizes <= first, first, sizes.max()).sum() if count == 2 else sizes.max() * len(sizes)
            for first in sizes
        )
        assert cost <= best


def test_few_sizes_of_positions() -> None:
    sizes = [position_count(count) for count in range(1, 5000)]
    assert all(size >= count for count, size in enumerate(sizes, 1))
    assert all(size <= max(64, count * 1.25) for count, size in enumerate(sizes, 1) if count > 256)
    assert len(set(sizes)) < 45 and all(size % 64 == 0 for size in sizes)


def test_packed_batches_hold_the_same_targets_with_documents_apart(tokenizer: Tokenizer) -> None:
    rows = [
        [{"role": "user", "content": "hi " * (i % 5)}, {"role": "assistant", "content": "one two " * (i % 9 + 1)}]
        for i in range(40)
    ]
    data = from_rows(rows, tokenizer, SamplesConfig(loss_on="all"))
    config = BatchConfig(packing=True, max_length=data.longest + 40, batch_size=3)
    for planned in plan_epoch(data.lengths, config, seed=0, epoch=0):
        batch = collate(data, planned, pad_id=tokenizer.pad_id)
        segments, ids = np.array(batch.segments), np.array(batch.tokens)
        positions, weights = np.array(batch.loss_positions), np.array(batch.weights)
        for row, samples in enumerate(planned.rows):
            for number, sample in enumerate(samples):
                assert ids[row][segments[row] == number].tolist() == data[sample].tokens.tolist()
        flat = segments.reshape(-1)
        learned = positions[weights > 0]
        assert (flat[learned] == flat[learned + 1]).all() and (flat[learned] >= 0).all()
        assert weights.sum() == sum(data.lengths[sample] - 1 for sample in planned.samples)
