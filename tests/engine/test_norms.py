"""RMS norms: against their plain formula in float64, values and gradients; what is kept of them, and where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora import mlxlm
from mlxlora.engine.device import settling, settling_afterwards
from mlxlora.engine.norms import NORM
from mlxlora.engine.products import Products
from mlxlora.engine.slots import Slots
from mlxlora.engine.tape import Tape, on
from mlxlora.parameters import number

WIDTH = 24
EPS = 1e-3
GEMMA = mlxlm.module("models.gemma").RMSNorm
BARE = mlxlm.module("models.gemma3n").RMSNoScale
KINDS: dict[str, Any] = {"plain": nn.RMSNorm, "1 + weight": GEMMA, "no weight": BARE}


def norm(kind: str, dtype: mx.Dtype = mx.float32) -> Any:
    made = KINDS[kind](**{"eps": EPS, **({} if kind == "no weight" else {"dims": WIDTH})})
    if "weight" in made:
        made.weight = mx.random.normal((WIDTH,), key=mx.random.key(1)).astype(dtype)
    return made


class Held:
    """A norm as a block has it: its forward pass writes a tape, its backward pass reads it."""

    def __init__(self, module: nn.Module) -> None:
        self.block = nn.Module()
        self.block.norm = module
        self.products, self.slots = Products(self.block), Slots(self.block)

    @contextmanager
    def traced(self, tape: Tape) -> Iterator[None]:
        with self.products.holding(), on(tape):
            yield

    def forward(self, x: mx.array) -> tuple[mx.array, Tape]:
        tape = Tape()
        with settling(), self.traced(tape):
            return self.block.norm(x), tape

    def gradients(
        self, x: mx.array, slope: mx.array, kept: list[mx.array], unread: frozenset[Any] = frozenset()
    ) -> tuple[mx.array, list[mx.array]]:
        """The value, and the gradients by x and by the weight if there is one."""
        module = self.block.norm

        def again(x: mx.array, *weights: mx.array) -> Any:
            with self.slots.holding(weights, self.slots.trainable), self.traced(Tape(kept, unread)):
                return module(x)

        with settling_afterwards():
            values, grads = mx.vjp(again, [x, *self.slots.get()], [slope])
        return values[0], grads


def truth(kind: str, module: Any, x: mx.array, slope: mx.array) -> tuple[mx.array, list[mx.array]]:
    """The same from the formula."""

    def formula(x: mx.array, *weights: mx.array) -> mx.array:
        factor = (1.0 + weights[0] if kind == "1 + weight" else weights[0]) if weights else 1.0
        return x / mx.sqrt((x * x).mean(axis=-1, keepdims=True) + EPS) * factor

    with mx.stream(mx.cpu):
        given = [x, *([module.weight] if "weight" in module else [])]
        values, grads = mx.vjp(formula, [array.astype(mx.float64) for array in given], [slope.astype(mx.float64)])
        mx.eval(values, grads)
    return values[0], grads


def error(found: mx.array, expected: mx.array) -> float:
    with mx.stream(mx.cpu):
        difference = mx.abs(found.astype(mx.float64) - expected).max()
        return number(difference / mx.maximum(mx.abs(expected).max(), 1e-30))


def example(shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
    """Rows of very different size, and one of zeros."""
    x = mx.random.normal(shape, key=mx.random.key(2)) * mx.exp(
        5 * mx.random.normal((*shape[:-1], 1), key=mx.random.key(3))
    )
    x[0, 0] = 0
    return x, mx.random.normal(shape, key=mx.random.key(4))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("across", [False, True], ids=["rows", "a view across them"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, across: bool) -> None:
    x, slope = example((2, 5, 3, WIDTH))
    if across:
        x, slope = x.swapaxes(1, 2), slope.swapaxes(1, 2)
    held = Held(norm(kind))
    value, grads = truth(kind, held.block.norm, x, slope)
    forward, tape = held.forward(x)
    again, found = held.gradients(x, slope, tape.results)
    assert error(forward, value) < 1e-6 and error(again, value) < 1e-6
    assert len(found) == len(grads) == (1 if kind == "no weight" else 2)
    assert all(error(a, b) < 2e-6 for a, b in zip(found, grads, strict=True))
    for row in range(5):  # not only the largest: each row by itself
        where = (1, slice(None), row) if across else (1, row)
        assert error(found[0][where], grads[0][where]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_one_number_a_row_is_kept_and_read(kind: str) -> None:
    x, slope = example((2, 5, 3, WIDTH))
    held = Held(norm(kind))
    value, tape = held.forward(x)
    assert [kept.shape for kept in tape.results] == [(2, 5, 3, 1)] and tape.sites == [(NORM, 0)]
    again, grads = held.gradients(x, slope, [2 * tape.results[0]])
    assert mx.allclose(again, 2 * value)
    # where nobody is said to need it, it is made again
    alone, found = held.gradients(x, slope, [], frozenset(tape.sites))
    assert mx.allclose(alone, value)
    expected = held.gradients(x, slope, tape.results)[1]
    assert all(mx.allclose(a, b, rtol=1e-5) for a, b in zip(found, expected, strict=True))
    assert not mx.allclose(grads[0], expected[0])


def test_an_accelerator_has_a_kernel_for_them(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], mx.fast.rms_norm
    monkeypatch.setattr(mx.fast, "rms_norm", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    x, _ = example((1, 4, WIDTH))
    tape = Held(norm("plain")).forward(x)[1]
    assert (len(calls), len(tape.results)) == ((0, 1) if machine == "CPU" else (1, 0))


@pytest.mark.parametrize("narrow", ["input", "weight", "both"])
def test_half_precision_is_left_to_mlx(narrow: str) -> None:
    x, slope = example((2, 5, WIDTH))
    x = x if narrow == "weight" else x.astype(mx.bfloat16)
    held = Held(norm("plain", mx.float32 if narrow == "input" else mx.bfloat16))
    weight = held.block.norm.weight
    plain = lambda x, weight: mx.fast.rms_norm(x, weight, EPS)  # noqa: E731
    value = plain(x, weight)
    forward, tape = held.forward(x)
    assert mx.array_equal(forward, value) and forward.dtype == value.dtype and not tape.results
    slope = slope.astype(value.dtype)
    _, expected = mx.vjp(plain, [x, weight], [slope])
    _, grads = held.gradients(x, slope, [])
    assert all(mx.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(grads, expected, strict=True))
