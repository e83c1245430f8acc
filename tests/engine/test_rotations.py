"""Rotary positions from tables: against mlx-lm's own modules, values and gradients, and where there are no tables."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora import mlxlm
from mlxlora.engine.device import settling
from mlxlora.engine.masks import Layout, Steering
from mlxlora.engine.rotations import KEPT, tables

rope_utils = mlxlm.module("models.rope_utils")
WIDTH, LENGTH = 16, 23
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, Any] = {
    "plain": lambda: nn.RoPE(WIDTH, base=100.0),
    "scaled": lambda: nn.RoPE(WIDTH, scale=0.25),
    "partial": lambda: nn.RoPE(6, base=100.0),
    "llama3": lambda: rope_utils.Llama3RoPE(WIDTH, 128, base=500.0, scaling_config=LLAMA3),
    "su": lambda: rope_utils.SuScaledRoPE(WIDTH, long_factor=[2.0] * 8, original_max_position_embeddings=64),
    "yarn": lambda: rope_utils.YarnRoPE(WIDTH, scaling_factor=4.0, mscale=1.3),
}


def agree(a: mx.array, b: mx.array) -> bool:
    return float(mx.abs(a - b).max()) < 1e-5


@pytest.mark.parametrize("name", list(ROPES))
def test_values_and_gradients(name: str) -> None:
    rope = ROPES[name]()
    half = getattr(rope, "dims", getattr(rope, "dim", 0)) // 2
    found = tables(rope, LENGTH, WIDTH, half)
    assert found is not None
    x, slope = mx.random.normal((2, 3, LENGTH, WIDTH)), mx.random.normal((2, 3, LENGTH, WIDTH))
    expected = mx.vjp(lambda x: rope(x + 0), [x], [slope])  # some of them write into what they are given
    turned = mx.vjp(found.turn, [x], [slope])
    assert agree(turned[0][0], expected[0][0]) and agree(turned[1][0], expected[1][0])


@pytest.mark.parametrize("turn", [nn.RoPE(WIDTH, traditional=True), lambda x: x * x, lambda x: x + 1])
def test_what_mixes_otherwise_has_none(turn: Any) -> None:
    assert tables(turn, LENGTH, WIDTH, WIDTH // 2) is None


@pytest.mark.parametrize("name", ["plain", "llama3"])
def test_documents_restart_and_a_batch_makes_its_tables_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Module()
    network.rope = ROPES[name]()
    x = mx.random.normal((1, 2, LENGTH, WIDTH))
    expected = mx.concatenate([network.rope(x[:, :, :9] + 0), network.rope(x[:, :, 9:] + 0)], axis=2)
    layout = Layout(linear=True, firsts=[0] * 9 + [9] * (LENGTH - 9))
    with Steering(network).with_layout(layout):
        assert not layout.tables and agree(network.rope(x), expected)
        with settling():
            found = [network.rope(x), network.rope(x[:, :1])]
            assert agree(found[0], expected) and agree(found[1], expected[:, :1])
            assert len(layout.tables) == 1
            for length in range(1, 2 * KEPT):
                network.rope(x[:, :, :length])
            assert len(layout.tables) == KEPT
    assert network.rope(x).shape == x.shape and len(layout.tables) == KEPT


@pytest.mark.parametrize("name", ["plain", "llama3", "su"])
def test_layers_of_the_same_frequencies_share_their_tables(name: str) -> None:
    network = nn.Module()
    network.ropes = [ROPES[name]() for _ in range(3)]
    network.other = nn.RoPE(WIDTH, base=77.0)
    x = mx.random.normal((1, 2, LENGTH, WIDTH))
    layout = Layout(linear=True)
    with Steering(network).with_layout(layout), settling():
        for rope in network.ropes:
            rope(x)
        assert len(layout.tables) == 1 and layout.kept == 3 * LENGTH * WIDTH * 4
        assert agree(network.other(x), nn.RoPE(WIDTH, base=77.0)(x))
        assert len(layout.tables) == 2
    assert not layout.kind.tables  # what is compiled or known for the next batch does not hold these
