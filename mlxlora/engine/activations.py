"""The activation of most models, SwiGLU, with one exponential forward and one backward and nothing kept but its inputs.

In place of mlx-lm's function on a CPU only. Each compiled pass has one result: with two, a CPU computes number by
number.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlxlora.engine import tape
from mlxlora.engine.compiled import by_shape
from mlxlora.engine.device import aside, settle
from mlxlora.engine.exponential import exponential, one_operation


@by_shape
def _product(gate: mx.array, x: mx.array, power: mx.array) -> mx.array:
    return (gate * x / (1 + power)).astype(x.dtype)


@by_shape
def _by_gate(gate: mx.array, x: mx.array, power: mx.array, cotangent: mx.array) -> mx.array:
    chance = 1 / (1 + power)
    return (cotangent * x * chance * (1 + gate * (1 - chance))).astype(gate.dtype)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """gate · sigmoid(gate) · x, in place of mlx-lm's function of this name."""
    known = tape.values(gate, x)
    written = tape.current()
    reading = written is not None and written.reading
    followed = known is None and reading
    powers: list[mx.array] = []  # of the forward pass, where the backward pass is about to ask for it

    @mx.custom_function
    def activation(gate: mx.array, x: mx.array) -> mx.array:
        gate, x = known or (gate, x)
        power = (one_operation if followed else exponential)(gate, -1.0)
        settle(power)
        if known and reading:
            powers.append(power)
        return _product(gate, x, power)

    @activation.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        return aside(_backward, *primals, cotangent, powers)

    value: Any = activation(gate, x)
    out: mx.array = value
    return out


def _backward(gate: mx.array, x: mx.array, cotangent: mx.array, powers: list[mx.array]) -> tuple[mx.array, mx.array]:
    power = powers.pop() if powers else exponential(gate, -1.0)
    settle(power)
    by_gate = _by_gate(gate, x, power, cotangent)
    settle(by_gate)
    return by_gate, _product(gate, cotangent, power)
