"""The optimizer against formulas written out by hand, and its schedules against what they promise."""

import itertools
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.errors import ConfigError
from mlxlora.training.optimizer import SETTINGS, Optimizer, OptimizerConfig, learning_rate


def rates(steps: int = 100, **options: object) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warmup_rises_then_cosine_falls_to_the_floor() -> None:
    values = rates(schedule="cosine", warmup_steps=10, min_learning_rate=0.1)
    assert values[:10] == [pytest.approx((step + 1) / 11) for step in range(10)]
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert all(a > b for a, b in itertools.pairwise(values[10:]))
    assert values[-1] == pytest.approx(0.1, abs=1e-3)


def test_linear_and_constant() -> None:
    assert rates(schedule="constant", warmup_ratio=0.0) == [1.0] * 100
    linear = rates(schedule="linear", warmup_ratio=0.0)
    assert np.allclose(np.diff(linear), -0.01)


def test_restarts_come_where_the_cycles_end() -> None:
    values = rates(schedule="cosine-restarts", warmup_steps=0, cycles=2, cycle_growth=3.0)
    jumps = [step for step in range(1, 100) if values[step] > values[step - 1]]
    assert jumps == [25]
    assert values[24] < 0.01 and values[25] == 1.0 and values[99] < 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"learning_rate": 20.0},
        {"betas": (0.9, 1.0)},
        {"warmup_ratio": 1.0},
        {"warmup_ratio": 0.1, "warmup_steps": 3},
        {"min_learning_rate": 1.0},
        {"max_grad_norm": 0.0},
        {"name": "adam", "weight_decay": 0.1},
        {"name": "sgd", "betas": (0.9, 0.99)},
    ],
)
def test_settings_that_cannot_be_right_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.\w+"):
        OptimizerConfig(**options)  # type: ignore[arg-type]


def reference_adamw(config: OptimizerConfig, value: np.ndarray, gradients: list[np.ndarray], steps: int) -> np.ndarray:
    """Kingma & Ba's algorithm 1 with Loshchilov & Hutter's decay, in float64."""
    first, second = np.zeros_like(value), np.zeros_like(value)
    beta1, beta2 = config.setting("betas")
    for step, gradient in enumerate(gradients, 1):
        rate = learning_rate(config, step - 1, steps)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        update = (first / (1 - beta1**step)) / (np.sqrt(second / (1 - beta2**step)) + config.setting("eps"))
        value = value - rate * config.setting("weight_decay") * value - rate * update
    return value


def test_adamw_is_the_papers() -> None:
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, max_grad_norm=None, schedule="linear")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(5, 3))
    gradients = [rng.normal(size=(5, 3)) for _ in range(7)]
    optimizer = Optimizer(config, steps=7)
    values = {"layers.0.lora_a": mx.array(start, mx.float32)}
    optimizer.init(values)
    for step, gradient in enumerate(gradients):
        summed = {"layers.0.lora_a": mx.array(4 * gradient, mx.float32)}
        values, norm, finite = optimizer.update(values, summed, mx.array(1.0), mx.array(4.0), step)
        assert finite.item()
        assert norm.item() == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    expected = reference_adamw(config, start, gradients, 7)
    assert np.allclose(np.array(values["layers.0.lora_a"]), expected, atol=2e-6)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_optimizer_descends_and_resumes_bit_for_bit(name: str) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.02, lora_plus_ratio=2.0, warmup_steps=0)  # type: ignore[arg-type]
    target = mx.random.normal((4, 6), key=mx.random.key(1))
    start = {"a.lora_a": mx.zeros((4, 6)), "a.lora_b": mx.zeros((4, 6)), "a.bias": mx.zeros((6,))}

    def gradients(values: dict[str, mx.array]) -> dict[str, mx.array]:
        return {key: value - (target if value.ndim == 2 else target[0]) for key, value in values.items()}

    def run(values: dict[str, mx.array], optimizer: Optimizer, steps: range) -> dict[str, mx.array]:
        for step in steps:
            values, _, _ = optimizer.update(values, gradients(values), mx.array(0.0), mx.array(1.0), step)
        mx.eval(values)
        return values

    whole = Optimizer(config, steps=20)
    whole.init(start)
    end = run(start, whole, range(20))
    assert sum(float(mx.abs(gradient).sum()) for gradient in gradients(end).values()) < sum(
        float(mx.abs(gradient).sum()) for gradient in gradients(start).values()
    )
    first = Optimizer(config, steps=20)
    first.init(start)
    half = run(start, first, range(9))
    saved = {key: mx.array(np.array(value)) for key, value in first.flat_state().items()}
    second = Optimizer(config, steps=20)
    second.init(half)
    second.restore(saved)
    again = run(half, second, range(9, 20))
    assert all(mx.array_equal(again[key], end[key]) for key in end)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_an_update_that_is_not_finite_changes_nothing(poison: float) -> None:
    optimizer = Optimizer(OptimizerConfig(), steps=3)
    values = {"w": mx.ones((3, 3))}
    optimizer.init(values)
    values, _, _ = optimizer.update(values, {"w": mx.ones((3, 3))}, mx.array(1.0), mx.array(1.0), 0)
    before = {key: np.array(value) for key, value in optimizer.flat_state().items() if key != "learning_rate"}
    bad = mx.ones((3, 3)).at[1, 1].add(poison)
    for gradient, loss in ((bad, 1.0), (mx.ones((3, 3)), poison)):
        new, _, finite = optimizer.update(values, {"w": gradient}, mx.array(loss), mx.array(1.0), 1)
        assert not finite.item()
        assert mx.array_equal(new["w"], values["w"])
        after = optimizer.flat_state()
        assert all(np.array_equal(before[key], np.array(after[key])) for key in before)


def test_clipping_bounds_the_norm_and_small_dims_are_not_decayed() -> None:
    config = OptimizerConfig(name="sgd", learning_rate=1.0, max_grad_norm=0.5, schedule="constant", warmup_steps=0)
    optimizer = Optimizer(config, steps=1)
    values = {"w": mx.zeros((2, 2))}
    optimizer.init(values)
    new, norm, _ = optimizer.update(values, {"w": 3 * mx.ones((2, 2))}, mx.array(0.0), mx.array(1.0), 0)
    assert norm.item() == pytest.approx(6.0)
    assert mx.linalg.norm(new["w"]).item() == pytest.approx(0.5, rel=1e-4)
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup_steps=0)
    optimizer = Optimizer(config, steps=1)
    values = {"w": mx.ones((2, 2)), "b": mx.ones((2,))}
    optimizer.init(values)
    zero = {"w": mx.zeros((2, 2)), "b": mx.zeros((2,))}
    new, _, _ = optimizer.update(values, zero, mx.array(0.0), mx.array(1.0), 0)
    assert np.allclose(np.array(new["w"]), 0.95) and np.allclose(np.array(new["b"]), 1.0)


def test_a_range_test_grows_by_equal_factors() -> None:
    values = rates(steps=41, schedule="range-test", warmup_steps=0, min_learning_rate=1e-4)
    assert values[0] == pytest.approx(1e-4) and values[-1] == pytest.approx(1.0)
    assert np.allclose(np.diff(np.log(values)), math.log(1e4) / 40)
    with pytest.raises(ConfigError, match="min_learning_rate"):
        OptimizerConfig(schedule="range-test")


@pytest.mark.parametrize(
    "options", [{"cycles": 2}, {"cycle_growth": 2.0}, {"min_learning_rate": 1e-5, "schedule": "constant"}]
)
def test_what_a_schedule_has_no_use_for_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        OptimizerConfig(**options)


def test_beginning_again_after_an_update_is_beginning() -> None:
    """The planner tries an update before the run begins; what MLX's optimizer held in that trace must not stay."""
    parameters = {"w": mx.ones((2, 2))}
    tried, fresh = (Optimizer(OptimizerConfig(), 4) for _ in range(2))
    tried.init(parameters)
    tried.update(parameters, parameters, mx.array(1.0), mx.array(1.0), 0)
    for optimizer in (tried, fresh):
        optimizer.init(parameters)
    assert {name: value.tolist() for name, value in tried.flat_state().items()} == {
        name: value.tolist() for name, value in fresh.flat_state().items()
    }


def stepped(config: OptimizerConfig, updates: int = 2) -> dict[str, mx.array]:
    parameters = {"matrix": mx.ones((2, 2)), "vector": mx.ones((2,))}
    gradients = {name: mx.full(value.shape, 0.1) for name, value in parameters.items()}
    optimizer = Optimizer(config, 10)
    optimizer.init(parameters)
    for step in range(updates):
        parameters, _, _ = optimizer.update(parameters, gradients, mx.array(1.0), mx.array(1.0), step)
    return parameters


def test_momentum() -> None:
    common: dict[str, Any] = {"name": "sgd", "learning_rate": 0.1, "schedule": "constant", "warmup_steps": 0}
    plain = stepped(OptimizerConfig(**common, momentum=0.0))["vector"]
    heavy = stepped(OptimizerConfig(**common, momentum=0.5))["vector"]
    assert plain.tolist() == pytest.approx([0.98] * 2)
    assert heavy.tolist() == pytest.approx([1 - 0.01 - 0.015] * 2)


def test_what_is_decayed() -> None:
    common: dict[str, Any] = {
        "name": "adamw",
        "learning_rate": 0.1,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.5,
    }
    matrices = stepped(OptimizerConfig(**common, decay_min_dims=2), 1)
    everything = stepped(OptimizerConfig(**common, decay_min_dims=0), 1)
    nothing = stepped(OptimizerConfig(**common, decay_min_dims=3), 1)
    assert matrices["matrix"].tolist() == everything["matrix"].tolist() != nothing["matrix"].tolist()
    assert matrices["vector"].tolist() == nothing["vector"].tolist() != everything["vector"].tolist()
