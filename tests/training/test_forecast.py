"""The planner's account against what runs really take."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlxlora.adapters import AdapterConfig, inject
from mlxlora.data import BatchConfig, SamplesConfig, load
from mlxlora.data.feed import Feed
from mlxlora.engine import Engine, EngineConfig
from mlxlora.engine.account import Account
from mlxlora.engine.blocks import BlockFunctions
from mlxlora.finetune import finetune
from mlxlora.objectives.sft import sft
from mlxlora.parameters import flat
from mlxlora.plan import plan
from mlxlora.tokenizer import Tokenizer
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Event, Finished, Started
from mlxlora.training.forecast import Forecast, Forecaster, outlook
from mlxlora.training.measured import only_last
from mlxlora.training.optimizer import Optimizer, OptimizerConfig
from mlxlora.training.shapes import Shape
from tests import tiny

PLENTY = 10**10
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160}


def forecaster(family: str, adapter: AdapterConfig, blocks: Any = "auto", **changes: Any) -> Forecaster:
    network = tiny.network(family, **changes)
    inject(network, adapter)
    optimizer = Optimizer(OptimizerConfig(), 10)
    optimizer.init(flat(network.trainable_parameters()))
    engine = Engine(network, EngineConfig(checkpoint_blocks=blocks, loss_chunk=64))
    return Forecaster(engine, optimizer, sft, tiny.VOCABULARY, PLENTY)


@pytest.mark.usefixtures("in_step")
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
        training=replace(training, steps=3, loss_chunk=64), on_event=seen.append,
    )  # fmt: skip
    started, finished = (next(event for event in seen if isinstance(event, kind)) for kind in (Started, Finished))
    assert started.predicted_peak == pytest.approx(finished.peak_memory, rel=0.1)  # type: ignore[union-attr]
    assert started.predicted_seconds > 0 and "tokens" in started.chosen  # type: ignore[union-attr]


@pytest.mark.usefixtures("in_step")
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_uneven_rows_are_foretold_as_they_are_computed(tmp_path: Path, family: str) -> None:
    """Laid end to end where the model allows it, padded where it carries a state from token to token."""
    sizes = SIZES | {"num_hidden_layers": 4} if family == "llama" else {"num_hidden_layers": 2}
    tiny.model_directory(tmp_path / "model", family, **sizes)
    rows = [json.dumps({"text": f"number {number} " * 3 * 2**number}) for number in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    seen: list[Event] = []
    finetune(
        str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")], tmp_path / "run",
        samples=SamplesConfig(max_length=400, validation_split=0.0),
        training=TrainingConfig(steps=2, batch_size=8, loss_chunk=64), on_event=seen.append,
    )  # fmt: skip
    started, finished = (next(event for event in seen if isinstance(event, kind)) for kind in (Started, Finished))
    assert started.predicted_peak == pytest.approx(finished.peak_memory, rel=0.1)  # type: ignore[union-attr]


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


@pytest.mark.usefixtures("in_step")
def test_the_longest_row_that_fits() -> None:
    told = forecaster("llama", AdapterConfig(rank=4), num_hidden_layers=4, **SIZES)
    shape = Shape(1, 256, 1.0)
    here = told.forecast(shape).peak
    for limit in (here - (here - told.resident) // 3, here + 2_000_000):
        most = told.most_tokens(shape, limit)
        assert told.forecast(replace(shape, length=most)).peak == pytest.approx(limit, rel=0.1)
    assert told.most_tokens(shape, told.resident) == 0
    told.engine.close()


def test_what_grows_with_the_square_of_a_row_is_foretold_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose attention is of another kind keeps tokens × tokens: twice the length is four times the memory."""
    told = forecaster("deepseek_v3", AdapterConfig(rank=4))

    def account(objective: Any, batch: Any, key: Any, *, gradients: bool) -> Account:
        rows, length = batch.tokens.shape
        return Account(rows * length**2 * 100, rows * length**2 * 50, 0, 0.1)

    monkeypatch.setattr(told.engine, "account", account)
    told.limit = told.resident + 50 * 3000**2
    found = told.step(Shape(1, 8192, 1.0))  # 2,048 tokens are tried
    assert found.peak == pytest.approx(100 * 8192**2, rel=0.01) and found.seconds == pytest.approx(0.4)
    known = [told.forecast(Shape(1, length, 1.0)) for length in (1024, 2048)]
    assert told.onward(known, 16_384) - told.resident == pytest.approx(100 * 16_384**2, rel=0.01)
    for limit in (100 * 1500**2, 100 * 3000**2):
        most = told.most_tokens(Shape(1, 2048, 1.0), told.resident + limit)
        assert most == pytest.approx((limit / 100) ** 0.5, rel=0.01)
    told.engine.close()


def test_a_short_row_whose_peak_is_something_else_does_not_end_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of a few tokens may be that of the update, or smaller for more tokens by chance."""
    told = forecaster("llama", AdapterConfig(rank=4))
    peaks = {12: 1_000_100, 25: 1_000_000, 50: 1_000_000}
    monkeypatch.setattr(
        told, "forecast", lambda shape: SimpleNamespace(peak=peaks.get(shape.length, 10_000 * shape.length))
    )
    assert told.most_tokens(Shape(1, 25, 1.0), 10_000_000) == 1_000
    assert told.most_tokens(Shape(1, 25, 1.0), 1_000_000) == 100
    told.engine.close()


def test_garbage_does_not_count_as_what_stays() -> None:
    clean = forecaster("llama", AdapterConfig(rank=4))
    clean.engine.close()
    gc.disable()
    try:
        cycle: list[Any] = [mx.zeros((1000, 1000))]
        mx.eval(cycle[0])
        cycle.append(cycle)
        del cycle
        found = forecaster("llama", AdapterConfig(rank=4))
    finally:
        gc.enable()
    found.engine.close()
    assert abs(found.resident - clean.resident) < 2_000_000  # networks of both, not the 4 MB


def test_an_optimizer_is_gone_when_nobody_holds_it() -> None:
    """Its moments must not wait for Python to look for cycles."""
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


class Ticks:
    """A clock by which everything between two looks at it takes one second."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.mark.parametrize(("layers", "frozen"), [(2, 4), ("all", 0)])
def test_frozen_blocks_are_foretold_as_often_as_they_run(
    layers: Any, frozen: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every part of a step counts one: no clock is looked at."""
    blocks, size, epochs = 6, 5, 3
    tiny.model_directory(tmp_path / "model", "llama", num_hidden_layers=blocks)
    rows = [json.dumps({"text": f"number {100 + number} " * 30}) for number in range(size)]  # all of one length
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    monkeypatch.setattr("mlxlora.engine.account.time", Ticks())
    asked: list[Any] = []
    run: list[str] = []

    def told(*arguments: Any) -> Any:
        asked.append(arguments)
        return outlook(*arguments)

    def counted(name: str) -> None:
        real = getattr(BlockFunctions, name)
        monkeypatch.setattr(BlockFunctions, name, lambda *given, **how: run.append(name) or real(*given, **how))

    for module in ("finetune", "plan"):
        monkeypatch.setattr(sys.modules[f"mlxlora.{module}"], "outlook", told)
    common = (str(tmp_path / "model"), [str(tmp_path / "rows.jsonl")])
    options: dict[str, Any] = {
        "samples": SamplesConfig(validation_split=0), "adapter": AdapterConfig(rank=2, layers=layers),
        "training": TrainingConfig(batch_size=1, epochs=epochs, checkpoint_blocks="products"),
    }  # fmt: skip
    plan(*common, **options)
    for name in ("forward", "backward"):
        counted(name)
    finetune(*common, tmp_path / "run", on_event=lambda e: run.clear() if isinstance(e, Started) else None, **options)

    seconds = []
    for feed, held_out, forecast, steps, validations, kept in asked:
        assert (steps, kept) == (size * epochs, 1.0 if frozen else 0.0)
        parts = blocks + 1 + (blocks - frozen) + 1  # forward, the loss, backward, the end
        assert forecast.frozen_seconds / forecast.seconds == pytest.approx(frozen / parts)
        alone = replace(forecast, update_seconds=0.0, seconds=float(parts), frozen_seconds=float(frozen))
        seconds.append(outlook(feed, held_out, alone, steps, validations, kept).seconds)
    unkept = size * epochs * (2 * blocks - frozen)
    assert seconds == pytest.approx([len(run) + size * epochs * 2] * 2)
    assert len(run) == unkept - size * (epochs - 1) * frozen


def test_every_update_of_a_run_takes_its_time(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{"dog " * size}"}}\n' for size in (20, 30, 40, 50)))
    tokenizer = Tokenizer.load(tiny.tokenizer(tmp_path))
    feed = Feed(load(tmp_path / "rows.jsonl", tokenizer, SamplesConfig(validation_split=0)).train, BatchConfig(), 0)
    shape = Shape(4, int(feed.dataset.lengths.max()), 1.0)
    quick = Forecast(
        "none", 0, 1, shape, 0, 0, 0, 0, 0, 0, 0, 2.0, validation_seconds=0.0, unpadded=False, update_seconds=0.0
    )
    without = outlook(feed, None, quick, steps=10, validations=0)
    slow = outlook(feed, None, replace(quick, update_seconds=0.5), steps=10, validations=0)
    assert without.seconds > 1 and slow.seconds == pytest.approx(without.seconds + 5.0)
    assert slow.tokens == without.tokens and slow.tokens_per_second < without.tokens_per_second
