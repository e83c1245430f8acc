"""The planner's account against what runs really take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.data import BatchConfig, SamplesConfig, load
from mlxlora.data.feed import Feed
from mlxlora.engine import Engine, EngineConfig
from mlxlora.engine.account import Account
from mlxlora.engine.packing import end_to_end
from mlxlora.finetune import finetune
from mlxlora.objectives.sft import sft
from mlxlora.parameters import flat
from mlxlora.tokenizer import Tokenizer
from mlxlora.training import forecast as forecasting
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Event, Finished, Started
from mlxlora.training.forecast import Forecast, Forecaster, Shape, ladder, largest, only_last, outlook, synthetic
from mlxlora.training.optimizer import Optimizer, OptimizerConfig
from tests import tiny

PLENTY = 10**10
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160}


def forecaster(family: str, adapter: AdapterConfig, blocks: Any = "auto", **changes: Any) -> Forecaster:
    network = tiny.network(family, **changes)
    inject(network, adapter)
    optimizer = Optimizer(OptimizerConfig(), 10)
    optimizer.init(flat(network.trainable_parameters()))
    engine = Engine(network, EngineConfig(checkpoint_blocks=blocks))
    return Forecaster(engine, optimizer, sft, tiny.VOCABULARY, PLENTY)


@pytest.mark.parametrize(
    ("family", "adapter", "training"),
    [
        ("llama", AdapterConfig(rank=8), TrainingConfig(batch_size=2)),
        ("llama", AdapterConfig(rank=8, layers=2), TrainingConfig(batch_size=2, accumulate=2)),
        ("gemma3", AdapterConfig(rank=8), TrainingConfig(batch_size=2, checkpoint_blocks="inputs")),
        ("llama", AdapterConfig(type="full"), TrainingConfig(batch_size=2)),
    ],
    ids=["lora", "upper-blocks", "inputs", "full"],
)
def test_a_run_takes_what_was_foretold(
    tmp_path: Path, family: str, adapter: AdapterConfig, training: TrainingConfig
) -> None:
    tiny.model_directory(tmp_path / "model", family, num_hidden_layers=6, **SIZES)
    rows = [json.dumps({"text": f"number {number} " * 60}) for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    seen: list[Event] = []
    samples = SamplesConfig(max_length=200, validation_split=0.2)
    finetune(
        str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")], tmp_path / "run", samples=samples, adapter=adapter,
        training=replace(training, steps=3), on_event=seen.append,
    )  # fmt: skip
    started, finished = (next(event for event in seen if isinstance(event, kind)) for kind in (Started, Finished))
    assert started.predicted_peak == pytest.approx(finished.peak_memory, rel=0.1)  # type: ignore[union-attr]
    assert started.predicted_seconds > 0 and "tokens" in started.chosen  # type: ignore[union-attr]


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_uneven_rows_are_foretold_as_they_are_computed(tmp_path: Path, family: str) -> None:
    """Laid end to end where the model allows it, padded where it carries a state from token to token."""
    sizes = SIZES if family == "llama" else {}
    tiny.model_directory(tmp_path / "model", family, num_hidden_layers=2, **sizes)
    rows = [json.dumps({"text": f"number {number} " * 3 * 2**number}) for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    seen: list[Event] = []
    finetune(
        str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")], tmp_path / "run",
        samples=SamplesConfig(max_length=400, validation_split=0.0),
        training=TrainingConfig(steps=2, batch_size=8), on_event=seen.append,
    )  # fmt: skip
    started, finished = (next(event for event in seen if isinstance(event, kind)) for kind in (Started, Finished))
    assert started.predicted_peak == pytest.approx(finished.peak_memory, rel=0.1)  # type: ignore[union-attr]


def test_a_batch_with_padding_is_as_full_as_the_one_it_stands_for() -> None:
    shape = Shape(4, 100, 0.5, filled=0.4)
    batch = synthetic(shape, tiny.VOCABULARY)
    assert batch.tokens.shape == (4, 100)
    assert batch.weights.sum().item() == shape.targets == 80
    places = np.array(batch.loss_positions)[np.array(batch.weights) > 0]
    assert {*(places // 100)} == {0, 1, 2, 3}
    laid = end_to_end(batch, traced=False)
    assert laid.tokens.shape[0] == 1 and laid.tokens.shape[1] == pytest.approx(160, abs=8)
    one = synthetic(shape.row(64), tiny.VOCABULARY)
    assert end_to_end(one, traced=False).tokens.shape == (1, 64)


def test_probing_leaves_network_and_optimizer_as_they_were() -> None:
    told = forecaster("qwen3", AdapterConfig(rank=4), num_hidden_layers=6)
    network = told.engine.network
    names = list(flat(network.parameters()))
    before = {name: value.tolist() for name, value in flat(network.trainable_parameters()).items()}
    found = told.forecast(Shape(1, 64, 1.0), 2, Shape(2, 32, 1.0))
    assert found.seconds > 0 and found.validation > 0 and found.moments >= 2 * found.adapter
    assert found.peak == found.resident + max(found.step, found.update, found.validation)
    assert list(flat(network.parameters())) == names
    assert {name: value.tolist() for name, value in flat(network.trainable_parameters()).items()} == before
    with only_last(network, 2):
        assert len(network.layers) == 2
    assert len(network.layers) == 6
    told.engine.close()


def test_what_fits_is_not_tried_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose few blocks alone would be too large is told from smaller ones."""
    told = forecaster("llama", AdapterConfig(rank=4), num_hidden_layers=4)
    tried: list[int] = []

    def account(objective: Any, batch: Any, key: Any, *, gradients: bool) -> Account:
        tried.append(batch.tokens.size)
        return Account(batch.tokens.size * 1000, batch.tokens.size * 500, 0, 0.1)

    monkeypatch.setattr(told.engine, "account", account)
    told.limit = told.resident + 500 * 9000
    assert told.step(Shape(8, 4096, 0.5)).peak == pytest.approx(8 * 4096 * 1000, rel=0.01)
    assert max(tried) <= 9000 and sorted(tried) == tried
    tried.clear()
    assert told.step(Shape(2, 2048, 0.5)).peak == 2 * 2048 * 1000 and max(tried) == 4096
    told.engine.close()


def test_shapes_grow_to_the_one_that_is_meant() -> None:
    shape = Shape(8, 4096, 0.5)
    sizes = [one.tokens for one in ladder(shape)]
    assert sizes[-1] == 8 * 4096 and sizes[0] <= 512 and sizes == sorted(sizes)
    assert ladder(Shape(2, 100, 1.0)) == [Shape(2, 100, 1.0)]


@pytest.mark.parametrize("blocks", ["none", "inputs"])
def test_a_step_that_is_one_graph(blocks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = forecaster("llama", AdapterConfig(rank=4), blocks, num_hidden_layers=8, **SIZES)
    monkeypatch.setattr(told.engine, "_chain", None)
    batch = synthetic(Shape(1, 200, 0.5), tiny.VOCABULARY)
    found = forecasting.one_graph(told.engine, sft, batch, True)
    if blocks == "none":  # the engine of the probe is a chain otherwise
        size, _ = forecasting.above(lambda: told.engine.value_and_grad(sft, batch, mx.random.key(0)))
        # what one graph holds at a time depends on how its two threads take turns
        assert found.peak == pytest.approx(size, rel=0.25)
    whole: list[int] = []
    probe = forecasting._whole

    def stubborn(network: Any, *rest: Any) -> Account:
        whole.append(len(network.layers))
        if len(network.layers) < 8:
            raise IndexError("list index out of range")
        return probe(network, *rest)

    monkeypatch.setattr(forecasting, "_whole", stubborn)
    forecasting.one_graph(told.engine, sft, batch, True)
    assert whole == [2, 8]  # a model that cannot lose blocks is probed whole
    told.engine.close()


def test_the_longest_row_that_fits() -> None:
    told = forecaster("llama", AdapterConfig(rank=4), num_hidden_layers=4, **SIZES)
    shape = Shape(1, 256, 1.0)
    here = told.forecast(shape).peak
    for limit in (here - (here - told.resident) // 3, here + 2_000_000):
        most = told.most_tokens(shape, limit)
        assert told.forecast(replace(shape, length=most)).peak == pytest.approx(limit, rel=0.1)
    assert told.most_tokens(shape, told.resident) == 0
    told.engine.close()


def test_the_largest_batch_of_the_data(tmp_path: Path) -> None:
    tiny.model_directory(tmp_path / "model", "llama")
    tokenizer = Tokenizer.load(tmp_path / "model")
    rows = [{"text": "word " * count} for count in (5, 80, 40, 10, 7, 60)]
    splits = load(rows, tokenizer, SamplesConfig(validation_split=0.0))
    shape = largest(splits.train, BatchConfig(batch_size=2), unpadded=False)
    assert shape.rows <= 2 and shape.tokens >= splits.train.lengths.max() and 0.8 < shape.learned <= 1.0
    packed = largest(splits.train, BatchConfig(batch_size=2, packing=True, max_length=200), unpadded=True)
    assert packed.documents > 1
    assert synthetic(packed, tiny.VOCABULARY).segments is not None


def test_an_optimizer_is_gone_when_nobody_holds_it() -> None:
    """Its moments must not wait for Python to look for cycles."""
    import gc

    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        optimizer = Optimizer(OptimizerConfig(), 1)
        parameters = {"a": mx.zeros((1000, 1000))}
        optimizer.init(parameters)
        made = optimizer.update(parameters, parameters, mx.array(0.0), mx.array(1.0), 0)
        mx.eval(made, optimizer.state)
        del made, optimizer, parameters
        assert mx.get_active_memory() - before < 1_000_000
    finally:
        gc.enable()


def test_the_update_is_told_by_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {f"{number}": mx.zeros((200, 500)) for number in range(40)}
    whole, seconds = forecasting.update_needs(OptimizerConfig(), parameters)
    assert seconds > 0
    monkeypatch.setattr(forecasting, "SAMPLE", 4_000_000)
    assert forecasting.update_needs(OptimizerConfig(), parameters)[0] == pytest.approx(whole, rel=0.25)
    assert forecasting.update_needs(OptimizerConfig(), {}) == (0, 0.0)


def test_every_update_of_a_run_takes_its_time(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{"dog " * size}"}}\n' for size in (20, 30, 40, 50)))
    tokenizer = Tokenizer.load(tiny.tokenizer(tmp_path))
    feed = Feed(load(tmp_path / "rows.jsonl", tokenizer, SamplesConfig(validation_split=0)).train, BatchConfig(), 0)
    shape = Shape(4, int(feed.dataset.lengths.max()), 1.0)
    quick = Forecast("none", 0, 1, shape, 0, 0, 0, 0, 0, 0, 0, seconds=2.0, validation_seconds=0.0, unpadded=False)
    without = outlook(feed, None, quick, steps=10, validations=0)
    slow = outlook(feed, None, replace(quick, update_seconds=0.5), steps=10, validations=0)
    assert without.seconds > 1 and slow.seconds == pytest.approx(without.seconds + 5.0)
    assert slow.tokens == without.tokens and slow.tokens_per_second < without.tokens_per_second
