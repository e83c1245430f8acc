"""The planner's account against what a step really takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.engine import Engine, EngineConfig
from mlxlora.errors import ConfigError, UnsupportedError
from mlxlora.objectives.sft import sft
from mlxlora.parameters import flat
from mlxlora.plan import other_machine, plan
from mlxlora.training.config import TrainingConfig
from mlxlora.training.forecast import (
    Shape,
    forecast,
    generous_bound,
    largest,
    only_blocks,
    probe,
    settle,
    synthetic,
)  # fmt: skip
from mlxlora.training.optimizer import Optimizer, OptimizerConfig
from tests import tiny


def prepared(family: str, adapter: AdapterConfig, **changes: Any) -> tuple[Any, Optimizer]:
    network = tiny.network(family, **changes)
    inject(network, adapter)
    optimizer = Optimizer(OptimizerConfig(), 10)
    optimizer.init(flat(network.trainable_parameters()))
    return network, optimizer


def measured(network: Any, optimizer: Optimizer, config: EngineConfig, shape: Shape) -> int:
    """The peak of a whole real step, update included."""
    engine = Engine(network, config)
    batch = synthetic(shape.rows, shape.length, shape.learned, tiny.VOCABULARY)
    peak, state = 0, optimizer.state
    for _ in range(2):
        mx.reset_peak_memory()
        total, count, _, gradients = engine.value_and_grad(sft, batch, mx.random.key(0))
        found = flat(gradients)
        mx.eval(found)
        new, _, _ = optimizer.update(flat(network.trainable_parameters()), found, total, count, 0)
        mx.eval(new, optimizer.state)
        optimizer.state, peak = state, mx.get_peak_memory()
        del new, found, gradients
    engine.close()
    return peak


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("grade", ["products", "inputs"])
def test_the_peak_is_foretold(family: str, grade: Any) -> None:
    network, optimizer = prepared(family, AdapterConfig(rank=8), num_hidden_layers=8)
    config, shape = EngineConfig(checkpoint_blocks=grade), Shape(2, 384, 0.4)
    found = forecast(network, config, optimizer, sft, shape, vocabulary=tiny.VOCABULARY)
    assert found.peak == pytest.approx(measured(network, optimizer, config, shape), rel=0.15)
    assert generous_bound(network, optimizer, shape, tiny.VOCABULARY) > found.peak
    assert found.seconds > 0 and found.adapter > 0 and found.moments >= 2 * found.adapter


def test_probing_leaves_network_and_optimizer_as_they_were() -> None:
    network, optimizer = prepared("qwen3", AdapterConfig(rank=4), num_hidden_layers=6)
    names, state = list(flat(network.parameters())), optimizer.state
    before = {name: value.tolist() for name, value in flat(network.trainable_parameters()).items()}
    forecast(network, EngineConfig(), optimizer, sft, Shape(1, 64, 1.0), vocabulary=tiny.VOCABULARY)
    assert list(flat(network.parameters())) == names and optimizer.state is state
    assert {name: value.tolist() for name, value in flat(network.trainable_parameters()).items()} == before
    with only_blocks(network, 2):
        assert len(network.layers) == 2
    assert len(network.layers) == 6


def test_fewer_blocks_kept_less_memory_and_settle_chooses() -> None:
    network, optimizer = prepared("llama", AdapterConfig(rank=4), num_hidden_layers=8)
    shape = Shape(2, 256, 0.5)
    products, inputs = (
        forecast(network, EngineConfig(checkpoint_blocks=grade), optimizer, sft, shape, vocabulary=tiny.VOCABULARY)
        for grade in ("products", "inputs")
    )
    assert inputs.peak < products.peak
    between = (inputs.peak + products.peak) // 2

    def choose(limit: int) -> str:
        return settle(network, optimizer, sft, shape, "auto", limit, vocabulary=tiny.VOCABULARY)[0]

    assert choose(10**10) == "products" and choose(products.peak * 2) == "products" and choose(between) == "inputs"
    with pytest.raises(UnsupportedError, match=r"will not fit.*tokens_per_batch|max_length"):
        choose(inputs.resident + inputs.step * 3 // 4)
    with pytest.raises(UnsupportedError, match="The model alone takes"):
        choose(inputs.resident // 2)


def test_a_model_that_cannot_lose_blocks_is_probed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    network, optimizer = prepared("llama", AdapterConfig(rank=4), num_hidden_layers=6)
    config, shape = EngineConfig(), Shape(1, 64, 1.0)
    import mlxlora.training.forecast as module

    calls = []

    def stubborn(network: Any, *rest: Any) -> tuple[int, float]:
        calls.append(len(network.layers))
        if len(network.layers) < 6:
            raise IndexError("list index out of range")
        return probe(network, *rest)

    monkeypatch.setattr(module, "probe", stubborn)
    forecast(network, config, optimizer, sft, shape, vocabulary=tiny.VOCABULARY)
    assert calls == [2, 6]


def test_the_largest_batch_of_the_data(tmp_path: Path) -> None:
    from mlxlora.data import BatchConfig, SamplesConfig, load
    from mlxlora.tokenizer import Tokenizer

    tiny.model_directory(tmp_path / "model", "llama")
    rows = [{"text": "word " * count} for count in (5, 80, 40, 10, 7, 60)]
    splits = load(rows, Tokenizer.load(tmp_path / "model"), SamplesConfig(validation_split=0.0))
    shape = largest(splits.train, BatchConfig(batch_size=2))
    assert shape.rows <= 2 and shape.rows * shape.length >= splits.train.lengths.max() and 0.9 < shape.learned <= 1.0


def test_the_verb(tmp_path: Path) -> None:
    tiny.model_directory(tmp_path / "model", "llama")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(30):
            file.write(json.dumps({"text": f"number {number} " * (3 + number)}) + "\n")
    options: dict[str, Any] = {"training": TrainingConfig(epochs=2, batch_size=2)}
    here = plan(str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")], **options)
    assert here.chosen == "products" and here.seconds and here.tokens_per_second
    assert [found.checkpoint_blocks for found in here.forecasts] == ["products", "inputs"]
    assert here.table[8192]["products"] > here.table[512]["products"] > here.forecasts[0].resident
    assert "the fastest that fits" in str(here) and "about" in str(here)
    there = plan(str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")], for_="M2 16GB", **options)
    assert there.machine == "M2 16GB" and there.seconds is None and there.limit < 12e9
    small = plan(str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")], memory_limit="1.2MB", **options)
    assert small.chosen is None and "does not fit" in str(small)


@pytest.mark.parametrize("text", ["M2", "16", "M2 2GB", ""])
def test_unknown_machines_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="M2 16GB"):
        other_machine(text)
