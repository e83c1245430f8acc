"""The training loop on a network of one matrix, where everything can be computed by hand.

The engine here is the plain computation; the real one is tested in tests/engine and tests/invariants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora.data.sample import Batch
from mlxlora.errors import ConfigError, TrainingError
from mlxlora.training.checkpoint import TrainingState
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Checkpoint, Control, Event, Finished, Started, Step, Validation
from mlxlora.training.loop import Trainer
from mlxlora.training.optimizer import Optimizer, OptimizerConfig
from mlxlora.training.steps import count_steps

VOCABULARY, WIDTH = 7, 5


class PlainEngine:
    """Logits of an embedding and a matrix, cross-entropy over weighted positions."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def evaluate(self, objective: Any, batch: Batch) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        hidden = self.network.embed(batch.tokens).reshape(-1, WIDTH)[batch.loss_positions]
        log_probs = nn.log_softmax(self.network.head(hidden), axis=-1)
        picked = mx.take_along_axis(log_probs, batch.targets[:, None], axis=-1)[:, 0]
        return objective(picked, batch)

    def value_and_grad(self, objective: Any, batch: Batch, key: mx.array | None = None) -> tuple[Any, ...]:
        def loss(parameters: Any) -> tuple[mx.array, mx.array]:
            self.network.update(parameters)
            value, count, _ = self.evaluate(objective, batch)
            return value, count

        before = self.network.trainable_parameters()
        (value, count), gradients = mx.value_and_grad(loss)(before)
        self.network.update(before)
        return value, count, {}, gradients


def objective(log_probs: mx.array, batch: Batch) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
    return -(batch.weights * log_probs).sum(), batch.weights.sum(), {}


class Rows:
    """Samples of different lengths, one batch per `size` of them, in another order each epoch."""

    def __init__(self, lengths: Sequence[int], size: int, shuffle: bool = True, poison: int | None = None) -> None:
        rng = np.random.default_rng(3)
        self.rows = [rng.integers(0, VOCABULARY, length) for length in lengths]
        self.size, self.shuffle, self.poison = size, shuffle, poison

    @property
    def samples(self) -> int:
        return len(self.rows)

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        order = list(range(len(self.rows)))
        if self.shuffle:
            np.random.default_rng(epoch).shuffle(order)
        return [tuple(order[start : start + self.size]) for start in range(0, len(order), self.size)]

    def batch(self, planned: tuple[int, ...]) -> Batch:
        width = max(len(self.rows[index]) for index in planned)
        tokens = np.zeros((len(planned), width), np.int32)
        positions, targets, weights = [], [], []
        for row, index in enumerate(planned):
            tokens[row, : len(self.rows[index])] = self.rows[index]
            for place in range(1, len(self.rows[index])):
                positions.append(row * width + place - 1)
                targets.append(int(self.rows[index][place]))
                weights.append(math.nan if index == self.poison else 1.0)
        return Batch(
            mx.array(tokens), mx.array(positions), mx.array(targets), mx.array(weights, mx.float32), samples=planned
        )

    def tokens(self, planned: tuple[int, ...]) -> tuple[int, int]:
        return sum(len(self.rows[i]) - 1 for i in planned), sum(len(self.rows[i]) for i in planned)

    def origins(self, planned: tuple[int, ...]) -> list[str]:
        return [f"rows.jsonl:{index + 1}" for index in planned]


class Memory:
    """A store that keeps states in a list."""

    def __init__(self) -> None:
        self.states: list[TrainingState] = []
        self.best: list[int] = []

    def save(self, state: TrainingState, *, adapter_writer: Any, best: bool, keep: int) -> Path:
        copy = {name: mx.array(np.array(value)) for name, value in state.adapter.items()}
        self.states.append(replace(state, adapter=copy))
        self.best += [state.step] if best else []
        return Path(f"step-{state.step}")


LENGTHS = [4, 9, 2, 30, 5, 5, 17, 3, 8, 12, 6]


def trainer(config: TrainingConfig, rows: Rows | None = None, **options: Any) -> Trainer:
    network = nn.Module()
    network.embed = nn.Embedding(VOCABULARY, WIDTH)
    network.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    network.embed.weight = mx.random.normal((VOCABULARY, WIDTH), key=mx.random.key(1))
    network.head.weight = mx.random.normal((VOCABULARY, WIDTH), key=mx.random.key(2))
    network.embed.freeze()
    rows = rows or Rows(LENGTHS, 2)
    optimizer = Optimizer(OptimizerConfig(learning_rate=0.05), count_steps(rows, config))
    options.setdefault("store", Memory())
    return Trainer(
        network=network,
        engine=PlainEngine(network),
        objective=objective,  # type: ignore[arg-type]  # its scores are PlainEngine's
        batches=rows,
        optimizer=optimizer,
        config=config,
        adapter_writer=lambda path: None,
        **options,
    )


def run(made: Trainer) -> list[Event]:
    return list(made)


def weights(made: Trainer) -> np.ndarray:
    return np.array(made.parameters["head.weight"])


def test_every_row_is_seen_each_epoch_and_the_remainder_is_applied() -> None:
    made = trainer(TrainingConfig(epochs=3, accumulate=4))
    events = run(made)
    steps = [event for event in events if isinstance(event, Step)]
    assert len(steps) == 3 * math.ceil(6 / 4)
    assert steps[-1].samples == 3 * len(LENGTHS)
    assert steps[-1].tokens == 3 * sum(length - 1 for length in LENGTHS)
    assert steps[-1].epoch == 3.0
    started = events[0]
    assert isinstance(started, Started) and started.epochs == 3.0 and started.steps == 6
    assert started.trainable_parameters == VOCABULARY * WIDTH


def test_fractions_of_epochs_and_steps() -> None:
    assert count_steps(Rows(LENGTHS, 2), TrainingConfig(epochs=0.5)) == 3
    assert count_steps(Rows(LENGTHS, 2), TrainingConfig(epochs=1.5)) == 9
    assert count_steps(Rows(LENGTHS, 2), TrainingConfig(steps=40)) == 40
    assert count_steps(Rows(LENGTHS, 2), TrainingConfig()) == 12


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_accumulation_is_one_large_batch(size: int) -> None:
    together = trainer(TrainingConfig(steps=1), Rows(LENGTHS, len(LENGTHS), shuffle=False))
    apart = trainer(TrainingConfig(steps=1, accumulate=math.ceil(11 / size)), Rows(LENGTHS, size, shuffle=False))
    one, other = run(together), run(apart)
    assert np.allclose(weights(together), weights(apart), atol=1e-6)
    losses = [next(event.loss for event in events if isinstance(event, Step)) for events in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_intervals_change_no_byte() -> None:
    plain = trainer(TrainingConfig(epochs=3))
    run(plain)
    busy = trainer(TrainingConfig(epochs=3, validate_every=1, save_every=2, report_every=4), validation=Rows([4, 5], 1))
    run(busy)
    assert weights(plain).tobytes() == weights(busy).tobytes()


@pytest.mark.parametrize("at", [1, 5, 6, 7, 11])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_resumed_run_is_the_run_never_interrupted(at: int, accumulate: int) -> None:
    config = TrainingConfig(steps=13, accumulate=accumulate, save_every=at)
    whole, store = trainer(config), Memory()
    run(whole)
    first = trainer(config, store=store)
    for event in first:
        if isinstance(event, Checkpoint):
            break
    state = store.states[0]
    assert state.step == at
    second = trainer(config, state=state)
    events = run(second)
    assert weights(second).tobytes() == weights(whole).tobytes()
    steps = [event for event in events if isinstance(event, Step)]
    assert steps[0].step == at + 1
    assert steps[-1].samples == whole.counters.samples
    assert second.counters.losses == whole.counters.losses


def test_stop_from_a_callback_saves() -> None:
    control, store = Control(), Memory()
    made = trainer(TrainingConfig(steps=50), control=control, store=store)
    events = []
    for event in made:
        events.append(event)
        if isinstance(event, Step) and event.step == 7:
            control.stop()
    assert isinstance(events[-1], Finished) and events[-1].reason == "stopped" and events[-1].step == 7
    assert [state.step for state in store.states] == [7]


def test_save_now_from_a_callback() -> None:
    control, store = Control(), Memory()
    for event in trainer(TrainingConfig(steps=9), control=control, store=store):
        if isinstance(event, Step) and event.step == 4:
            control.save()
    assert [state.step for state in store.states] == [4, 9]


def test_the_best_validation_is_kept_and_patience_ends_the_run() -> None:
    store = Memory()
    config = TrainingConfig(steps=400, validate_every=5, patience=2)
    made = trainer(config, validation=Rows([15, 11], 1, shuffle=False), store=store)
    events = run(made)
    validations = [event for event in events if isinstance(event, Validation)]
    assert validations[0].step == 0 and not validations[0].best and validations[0].best_loss is None
    later = validations[1:]
    lowest = min(later, key=lambda event: event.loss)
    finished = events[-1]
    assert isinstance(finished, Finished) and finished.reason == "patience"
    assert finished.best_step == lowest.step == store.best[-1]
    assert [event.best for event in later[-2:]] == [False, False]


def test_target_loss_and_time_limit() -> None:
    events = run(trainer(TrainingConfig(steps=400, target_loss=2.0)))
    assert isinstance(events[-1], Finished) and events[-1].reason == "target_loss" and events[-1].step < 400
    events = run(trainer(TrainingConfig(steps=400, max_minutes=1e-9)))
    assert isinstance(events[-1], Finished) and events[-1].reason == "max_minutes" and events[-1].step == 1


@pytest.mark.parametrize("report_every", [1, 5])
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(report_every: int) -> None:
    store = Memory()
    rows = Rows(LENGTHS, 1, poison=4)
    bad = next(step for step, planned in enumerate(rows.plan(0), 1) if planned == (4,))
    config = TrainingConfig(epochs=1, save_every=1, report_every=report_every)
    made = trainer(config, rows, store=store)
    with pytest.raises(TrainingError, match=rf"step {bad}: .*rows\.jsonl:5.*skip_nonfinite"):
        run(made)
    assert [state.step for state in store.states] == list(range(1, bad))


def test_such_steps_can_be_allowed_and_change_nothing() -> None:
    rows = Rows(LENGTHS, 1, poison=4)
    made = trainer(TrainingConfig(epochs=1, skip_nonfinite=1), rows)
    before, applied = weights(made), []
    for event in made:
        if isinstance(event, Step):
            now = weights(made)
            if not event.applied:
                assert np.array_equal(before, now)
            before = now
            applied.append(event.applied)
    assert applied.count(False) == 1
    with pytest.raises(TrainingError):
        run(trainer(TrainingConfig(epochs=2, skip_nonfinite=1), rows))


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 1, "steps": 3},
        {"batch_size": 1, "tokens_per_batch": 3},
        {"epochs": 0},
        {"epochs": math.inf},
        {"steps": 0},
        {"batch_size": -1},
        {"accumulate": 0},
        {"keep": 0},
        {"patience": 0},
        {"seed": -1},
        {"max_minutes": 0.0},
        {"target_loss": -1.0},
        {"skip_nonfinite": -1},
    ],
)
def test_settings_that_cannot_be_right_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        TrainingConfig(**options)
