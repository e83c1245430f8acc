"""The activation of most models, SwiGLU, with one sigmoid forward and one backward and nothing kept but its inputs."""

from __future__ import annotations

import mlx.core as mx

from mlxlora.engine.device import power, unit


def _sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + power(x * -unit()))


@mx.compile
def _forward(gate: mx.array, x: mx.array) -> mx.array:
    return gate * _sigmoid(gate) * x


@mx.compile
def _backward(gate: mx.array, x: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    chance = _sigmoid(gate)
    by_x = cotangent * gate * chance
    return cotangent * x * chance * (1 + gate * (1 - chance)), by_x


@mx.custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """gate · sigmoid(gate) · x, in place of mlx-lm's function of this name."""
    return _forward(gate, x)


@swiglu.vjp
def _swiglu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    return _backward(*primals, cotangent)
