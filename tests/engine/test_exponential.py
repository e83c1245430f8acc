"""The exponential of a CPU: against numpy in double precision, at its edges, and within a gradient."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.engine import exponential as module
from mlxlora.engine.device import aside, settling, settling_afterwards
from mlxlora.engine.exponential import exponential, one_operation, power_of_two


@pytest.mark.parametrize("factor", [1.0, -1.0])
@pytest.mark.parametrize("large", [False, True])
def test_three_units_of_the_last_place(factor: float, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 0 if large else 1 << 30)
    x = np.linspace(-86.9, 88.0, 200_003, dtype=np.float32)
    expected = np.exp(x.astype(np.float64))
    with settling():
        found = np.array(exponential(mx.array(x * np.float32(factor)), factor))
    assert np.max(np.abs(found - expected) / expected) < 3 * 2.0**-23


@pytest.mark.parametrize("large", [False, True])
def test_powers_of_two_to_three_units_of_the_last_place(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 0 if large else 1 << 30)
    x = np.concatenate([np.linspace(-126.0, 127.4, 200_003), np.arange(-126, 128), np.arange(-126, 127) + 0.5])
    x = x.astype(np.float32)
    expected = np.exp2(x.astype(np.float64))
    with settling():
        found = np.array(power_of_two(mx.array(x)))
    assert np.max(np.abs(found - expected) / expected) < 3 * 2.0**-23
    assert np.allclose(np.array(power_of_two(mx.array(x))), expected, rtol=1e-4)  # where nothing settles


def test_edges_of_powers_of_two() -> None:
    x = mx.array([0.0, -0.0, 1.0, -127.6, -1e4, -1e30, -1e35, 128.6, 1e4, 2e9, mx.nan])
    with settling():
        found = np.array(power_of_two(x))
    assert found[:10].tolist() == [1.0, 1.0, 2.0, 0.0, 0.0, 0.0, 0.0, np.inf, np.inf, np.inf] and np.isnan(found[10])


def test_edges() -> None:
    x = mx.array([0.0, -0.0, -87.8, -1e30, -mx.inf, 88.7, 1e4, 1e30, mx.nan])
    with settling():
        found = np.array(exponential(x))
    assert found[:8].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, np.inf, np.inf, np.inf] and np.isnan(found[8])


def test_every_shape_and_thread_its_own_trace() -> None:
    module._passes.cache_clear()
    results: list[mx.array] = []

    def add(*shapes: tuple[int, ...]) -> None:
        with settling():
            results.extend(exponential(mx.ones(shape)) for shape in shapes)

    add((3,), (2, 3), (3,))
    thread = threading.Thread(target=add, args=((3,),))
    thread.start()
    thread.join()
    assert module._passes.cache_info().currsize == 3
    assert all(np.allclose(np.array(result), np.e) for result in results[:3])


def test_one_operation() -> None:
    x = mx.linspace(-20, 20, 101)
    assert np.allclose(np.array(one_operation(x)), np.exp(np.array(x)), rtol=1e-5)
    assert mx.array_equal(exponential(x, -1.0), one_operation(-x)).item()  # where nothing settles
    half = x.astype(mx.bfloat16)
    assert np.allclose(np.array(one_operation(half)), np.exp(np.array(half.astype(mx.float32))), rtol=1e-5)


def test_what_is_compiled_stays_so_within_a_gradient() -> None:
    calls: list[bool] = []

    def slope(x: mx.array, cotangent: mx.array) -> mx.array:
        calls.append(True)
        return cotangent * x * 2

    compiled = mx.compile(slope)

    @mx.custom_function
    def square(x: mx.array) -> mx.array:
        return x * x

    @square.vjp
    def backward(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
        found: mx.array = aside(compiled, x, cotangent)
        return found

    with settling_afterwards():
        for _ in range(3):
            gradient = mx.vjp(square, [mx.array([3.0])], [mx.array([1.0])])[1][0]
            assert gradient.tolist() == [6.0]
    assert len(calls) == 1  # traced once, not called each time
