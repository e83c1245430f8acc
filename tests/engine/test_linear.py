"""Layers of one input: only what somebody asks for is computed."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import device, linear
from mlxlora.engine.linear import Group, member
from tests import tiny


@pytest.mark.parametrize("followed", [False, True])
def test_gradient_of_an_input_that_nobody_follows(followed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the first block would be three large products for nothing."""
    network = tiny.network("llama")
    inject(network, AdapterConfig(rank=3))
    attention = network.layers[0].self_attn
    members = [member(module) for module in (attention.q_proj, attention.k_proj)]
    group = Group([one for one in members if one is not None])
    x = mx.random.normal((1, 7, network.args.hidden_size))
    outs, zs = group.forward(x)
    settled: list[mx.array] = []
    for module in (device, linear):
        monkeypatch.setattr(module, "settle", lambda *arrays: settled.extend(arrays))
    given = [x] if followed else []

    def loss(*followed: mx.array) -> mx.array:
        again = group.replayed(followed[0] if followed else x, outs, zs)
        return sum((out.sum() for out in again), mx.array(0.0))

    learned = [lora["lora_a"] for lora in (attention.q_proj, attention.k_proj)]

    def with_learned(*arrays: mx.array) -> mx.array:
        attention.q_proj.lora_a, attention.k_proj.lora_a = arrays[:2]
        return loss(*arrays[2:])

    grads = mx.grad(with_learned, argnums=tuple(range(2 + followed)))(*learned, *given)
    assert len(grads) == 2 + followed
    assert sum(array.size == x.size for array in settled) == 1 + followed  # x itself, and its gradient
