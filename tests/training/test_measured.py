"""What is measured on less, against the whole."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import Engine, EngineConfig
from mlxlora.engine.account import Account
from mlxlora.objectives.sft import sft
from mlxlora.training import measured
from mlxlora.training.optimizer import OptimizerConfig
from mlxlora.training.shapes import Shape, synthetic
from tests import tiny


@pytest.mark.usefixtures("in_step")
@pytest.mark.parametrize("blocks", ["none", "inputs"])
def test_a_step_that_is_one_graph(blocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.network("llama", num_hidden_layers=8, hidden_size=64, intermediate_size=160)
    inject(network, AdapterConfig(rank=4))
    engine = Engine(network, EngineConfig(checkpoint_blocks=blocks))
    monkeypatch.setattr(engine, "_chain", None)
    batch = synthetic(Shape(1, 200, 0.5), tiny.VOCABULARY)
    found = measured.one_graph(engine, sft, batch, True)
    if blocks == "none":  # the engine of the probe is a chain otherwise
        size, _ = measured.above(lambda: engine.value_and_grad(sft, batch, mx.random.key(0)))
        assert found.peak == pytest.approx(size, rel=0.1)
    whole: list[int] = []
    probe = measured._whole

    def stubborn(network: Any, *rest: Any) -> Account:
        whole.append(len(network.layers))
        if len(network.layers) < 8:
            raise IndexError("list index out of range")
        return probe(network, *rest)

    monkeypatch.setattr(measured, "_whole", stubborn)
    measured.one_graph(engine, sft, batch, True)
    assert whole == [2, 8]  # a model that cannot lose blocks is probed whole
    engine.close()


@pytest.mark.usefixtures("in_step")
def test_the_update_is_told_by_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {f"{number}": mx.zeros((200, 500)) for number in range(40)}
    whole, seconds = measured.update_needs(OptimizerConfig(), parameters)
    assert seconds > 0
    monkeypatch.setattr(measured, "SAMPLE", 4_000_000)
    assert measured.update_needs(OptimizerConfig(), parameters)[0] == pytest.approx(whole, rel=0.1)
    assert measured.update_needs(OptimizerConfig(), {}) == (0, 0.0)
