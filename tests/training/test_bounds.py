"""When a run ends early, and when its loss is worth a word."""

from __future__ import annotations

import pytest

from mlxlora.training.bounds import LossWatch, reached
from mlxlora.training.config import TrainingConfig
from mlxlora.training.counters import Counters


@pytest.mark.parametrize(
    ("config", "counters", "validates", "reason"),
    [
        ({"patience": 2}, {"without_better": 1}, True, None),
        ({"patience": 2}, {"without_better": 2}, True, "patience"),
        ({"target_loss": 1.0}, {"best_loss": 1.0, "losses": [9.0] * 20}, True, "target_loss"),
        ({"target_loss": 1.0}, {"losses": [0.1] * 20}, True, None),
        ({"target_loss": 1.0}, {"losses": [0.1] * 19}, False, None),
        ({"target_loss": 1.0}, {"losses": [9.0] * 20 + [0.1] * 20}, False, "target_loss"),
        ({"max_minutes": 1.0}, {}, True, "max_minutes"),
        ({"max_minutes": 1.1}, {}, True, None),
        ({}, {"without_better": 99, "best_loss": 0.0, "losses": [0.0] * 50}, True, None),
    ],
)
def test_bounds(config: dict, counters: dict, validates: bool, reason: str | None) -> None:
    assert reached(TrainingConfig(**config), Counters(**counters), 60.0, validates=validates) == reason


def test_a_high_loss_is_told_once_and_told_again_when_it_comes_back() -> None:
    watch, losses, said = LossWatch(), [1.0] * 30, []
    for loss in [2.1] * 4 + [1.0] + [2.1] * 7 + [1.0] + [2.1] * 5:
        losses = [*losses, loss][-50:]
        said.append(watch.look(loss, losses) is not None)
    assert [step for step, told in enumerate(said) if told] == [9, 17]


def test_few_losses_say_nothing() -> None:
    watch = LossWatch()
    assert not any(watch.look(9.0, [1.0] * 18 + [9.0]) for _ in range(9))
