"""The pipeline from files to an adapter, on a tiny model: what a user does, and what stands in the run directory."""

from __future__ import annotations

import importlib.machinery
import json
import random
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml

from mlxlora import cli
from mlxlora.adapters import AdapterConfig
from mlxlora.data import SamplesConfig
from mlxlora.errors import AdapterError, ConfigError, DataError, RunError
from mlxlora.finetune import finetune
from mlxlora.reporting.jsonl import read
from mlxlora.reporting.report import report
from mlxlora.reporting.watch import FinetuneResult
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Control, Event, Step, Validation
from mlxlora.training.optimizer import OptimizerConfig
from tests import tiny


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    source = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            a, b = source.randrange(50), source.randrange(50)
            question = f"What is {a} and {b}? " + "well " * source.randrange(20)
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {a + b}."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("finetune")
    tiny.model_directory(place / "model", "llama")
    write_rows(place / "rows.jsonl", 40)
    return place


OPTIONS: dict[str, Any] = {
    "samples": SamplesConfig(validation_split=0.2),
    "adapter": AdapterConfig(rank=4, dropout=0.1),
    "optimizer": OptimizerConfig(learning_rate=5e-3),
    "training": TrainingConfig(steps=12, save_every=5, validate_every=6, batch_size=4, accumulate=2),
}


def train(place: Path, out: Path, **changes: Any) -> FinetuneResult:
    return finetune(str(place / "model"), [str(place / "rows.jsonl")], out, **(OPTIONS | changes))


@pytest.fixture(scope="module")
def whole(place: Path) -> FinetuneResult:
    """A run never interrupted."""
    return train(place, place / "whole")


def weights(run: Path, name: str = "adapter") -> bytes:
    return (run / name / "adapters.safetensors").read_bytes()


def test_it_learns_and_leaves_a_whole_run(place: Path, whole: FinetuneResult) -> None:
    assert whole.reason == "done" and whole.step == 12
    assert whole.baseline_loss is not None and whole.best_loss is not None
    assert whole.best_loss < whole.baseline_loss - 0.5
    run = whole.run
    assert {path.name for path in run.iterdir()} >= {"adapter", "best", "checkpoints", "config.yaml", "metrics.jsonl"}
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 13))
    assert {"epoch", "loss", "learning_rate", "tokens", "tokens_per_second", "peak_memory", "grad_norm"} <= set(
        steps[0]
    )
    assert [event["step"] for event in events if event["event"] == "validation"] == [0, 6, 12]
    assert str(whole.adapter).endswith("best") and str(whole).splitlines()[-1].startswith("next: mlxlora chat")


def test_stock_mlx_lm_loads_the_adapter(place: Path, whole: FinetuneResult) -> None:
    from mlx_lm.utils import load

    tokens = mx.array([[3, 4, 5, 6]])
    plain, _ = load(str(place / "model"))
    tuned, _ = load(str(place / "model"), adapter_path=str(whole.run / "adapter"))
    assert float(mx.abs(plain(tokens) - tuned(tokens)).max()) > 1e-3


def test_the_written_configuration_repeats_the_run(
    place: Path, whole: FinetuneResult, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place / "whole" / "config.yaml"
    tree = yaml.safe_load(config.read_text())
    assert tree["adapter"]["rank"] == 4 and tree["training"]["steps"] == 12
    code = cli.main(["train", "--config", str(config), "--out", str(place / "again"), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert json.loads(captured.out)["best_loss"] == whole.best_loss
    assert weights(place / "again") == weights(whole.run)


@pytest.mark.parametrize("at", [3, 5, 7])
def test_an_interrupted_run_goes_on_bit_for_bit(place: Path, whole: FinetuneResult, tmp_path: Path, at: int) -> None:
    control = Control()
    seen: list[Event] = []

    def watch(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Step) and event.step == at:
            control.stop()

    stopped = train(place, tmp_path / "run", on_event=watch, control=control)
    assert stopped.reason == "stopped" and stopped.step == at and "goes on" in str(stopped)
    resumed = train(place, tmp_path / "run")
    assert resumed.reason == "done" and resumed.best_loss == whole.best_loss
    assert resumed.baseline_loss == whole.baseline_loss
    assert weights(tmp_path / "run") == weights(whole.run)
    assert weights(tmp_path / "run", "best") == weights(whole.run, "best")

    def told(run: Path) -> list[tuple[str, int, float]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [(e["event"], e["step"], e["loss"]) for e in lines if e["event"] in ("step", "validation")]

    assert told(tmp_path / "run") == told(whole.run)


def test_a_finished_run_is_kept_unless_overwritten(place: Path, whole: FinetuneResult) -> None:
    before = weights(whole.run)
    with pytest.raises(RunError, match="--overwrite"):
        train(place, whole.run)
    assert weights(whole.run) == before


def test_a_run_begins_where_another_ended(place: Path, whole: FinetuneResult, tmp_path: Path) -> None:
    losses: list[float] = []
    newest = whole.run / "adapter"
    options = {"adapter": AdapterConfig(rank=6, alpha=3.0), "start_from": newest}  # a larger rank, another scale

    def watch(event: Event) -> None:
        if isinstance(event, Validation):
            losses.append(event.loss)

    train(place, tmp_path / "run", on_event=watch, training=TrainingConfig(steps=2), **options)
    events = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    ended = [event["loss"] for event in events if event["event"] == "validation"][-1]
    assert losses[0] == pytest.approx(ended, rel=1e-5) and losses[-1] != losses[0]


def test_what_a_run_began_with_must_not_change(place: Path, whole: FinetuneResult, tmp_path: Path) -> None:
    control = Control()

    def stop(event: Event) -> None:
        if isinstance(event, Step):
            control.stop()

    train(place, tmp_path / "run", start_from=whole.run / "adapter", on_event=stop, control=control)
    with pytest.raises(RunError, match=r"start_from: was [0-9a-f]+…, is now \(not set\)"):
        train(place, tmp_path / "run")


def test_what_a_run_cannot_begin_with(place: Path, whole: FinetuneResult, tmp_path: Path) -> None:
    start = whole.run / "adapter"
    with pytest.raises(AdapterError, match=r"made with --adapter\.targets all-linear\)") as wrong:
        train(place, tmp_path / "run", start_from=start, adapter=AdapterConfig(rank=4, targets=["q_proj"]))
    assert "mlp.up_proj: in the adapter, but not set up" in str(wrong.value)
    with pytest.raises(AdapterError, match="has rank 4, which is more"):
        train(place, tmp_path / "run", start_from=start, adapter=AdapterConfig(rank=2))
    other = tiny.model_directory(tmp_path / "other", "llama", seed=3)
    with pytest.raises(AdapterError, match="the adapter was made for"):
        finetune(str(other), [str(place / "rows.jsonl")], tmp_path / "run", start_from=start, **OPTIONS)
    with pytest.raises(AdapterError, match="no adapter at"):
        train(place, tmp_path / "run", start_from=tmp_path / "nothing")
    with pytest.raises(ConfigError, match="another --out"):
        train(place, whole.run, start_from=start, overwrite=True)
    assert not (tmp_path / "run").exists()


def test_a_setting_that_nothing_acts_on_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora_b"):
        train(
            place, tmp_path / "run", adapter=AdapterConfig(type="full"), optimizer=OptimizerConfig(lora_plus_ratio=4.0)
        )


def test_what_changed_is_named_when_a_run_would_go_on(place: Path, tmp_path: Path) -> None:
    control = Control()
    control.stop()
    train(place, tmp_path / "run", control=control)
    with pytest.raises(RunError, match=r"adapter\.rank: was 4, is now 8"):
        train(place, tmp_path / "run", adapter=AdapterConfig(rank=8, dropout=0.1))
    with pytest.raises(RunError, match=r"data: was"):
        finetune(str(place / "model"), [str(write_rows(tmp_path / "o.jsonl", 40, 1))], tmp_path / "run", **OPTIONS)
    faster = OptimizerConfig(learning_rate=1e-2)
    with pytest.raises(RunError, match=r"optimizer\.learning_rate"):
        train(place, tmp_path / "run", optimizer=faster)
    with pytest.raises(ConfigError, match=r"Did you mean .optimizer\.learning_rate"):
        train(place, tmp_path / "run", optimizer=faster, accept_changes=["optimizer.learning_rat"])
    with pytest.raises(ConfigError, match=r"adapter\.rank"):
        train(place, tmp_path / "run", accept_changes=["adapter.rank"])
    longer = replace(OPTIONS["training"], steps=3, validate_every=1, keep=1)
    result = train(
        place, tmp_path / "run", optimizer=faster, training=longer, accept_changes=["optimizer.learning_rate"]
    )
    assert result.reason == "done" and result.step == 3


def test_data_is_refused_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1"):
        finetune(str(place / "model"), [str(tmp_path / "bad.jsonl")], tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_the_model_is_left_as_it_was_and_runs_do_not_disturb_each_other(place: Path, tmp_path: Path) -> None:
    short = replace(OPTIONS["training"], steps=2)
    first = train(place, tmp_path / "a", training=short)
    second = train(place, tmp_path / "b", training=short)
    assert weights(first.run) == weights(second.run)


def test_without_validation_the_last_adapter_is_the_one_to_use(place: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    result = train(
        place, tmp_path / "run", samples=SamplesConfig(validation_split=0.0),
        training=replace(OPTIONS["training"], steps=2), on_event=seen.append,
    )  # fmt: skip
    assert not any(isinstance(event, Validation) for event in seen)
    assert result.adapter.name == "adapter" and result.best_loss is None


def test_the_report_and_samples_are_there(place: Path, tmp_path: Path) -> None:
    result = train(place, tmp_path / "run", training=replace(OPTIONS["training"], steps=4, sample_every=2))
    lines = [json.loads(line) for line in (result.run / "metrics.jsonl").read_text().splitlines()]
    samples = [event for event in lines if event["event"] == "samples"]
    assert [event["step"] for event in samples] == [0, 2, 4]
    assert "What is" in samples[0]["prompts"][0] and len(samples[0]["answers"]) == 3
    assert all(text.startswith("It is") for text in samples[0]["expected"])
    text = (result.run / "report.html").read_text()
    assert "What the model said" in text and "after step 4" in text and "validation loss before" in text
    assert report([result.run]).report.read_text() == text  # what the run kept of its events is what they say
    usual = train(place, tmp_path / "usual", training=replace(OPTIONS["training"], steps=4))
    without = train(place, tmp_path / "without", training=replace(OPTIONS["training"], steps=4, sample_every=0))
    assert weights(usual.run) == weights(without.run) == weights(result.run)
    looks = [event["step"] for event in read(usual.run / "metrics.jsonl") if event["event"] == "samples"]
    assert looks == [0, 4] and [one.step for one in usual.said] == [4, 4, 4]
    assert usual.said[0].before != usual.said[0].after and "  before " in str(usual)
    assert not without.said and "What the model said" not in (without.run / "report.html").read_text()


def test_a_run_that_ends_early_shows_its_last_answers(place: Path, tmp_path: Path) -> None:
    early = replace(OPTIONS["training"], steps=9, validate_every=1, target_loss=99.0)
    result = train(place, tmp_path / "run", training=early)
    assert result.reason == "target_loss" and result.said[0].step == result.step == 1


def test_gentle_and_memory_limit_change_no_byte(place: Path, tmp_path: Path) -> None:
    short = replace(OPTIONS["training"], steps=2)
    before = mx.set_memory_limit(10**10)
    try:
        first = train(place, tmp_path / "a", training=short)
        second = train(place, tmp_path / "b", training=short, gentle=True, memory_limit="2GB")
        assert weights(first.run) == weights(second.run)
        assert mx.set_memory_limit(10**10) == 10**10
    finally:
        mx.set_memory_limit(before)


def test_trackers_get_the_curves(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        train(place, tmp_path / "run", report_to=["tensorbord"])
    (tmp_path / "wandb.py").write_text(
        "calls = []\n"
        "def init(**options): calls.append(('init', options['name']))\n"
        "def log(values, step): calls.append((step, sorted(values)))\n"
        "def finish(): calls.append('finish')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    train(place, tmp_path / "run", report_to=["wandb"], training=replace(OPTIONS["training"], steps=2))
    import wandb

    assert wandb.calls[0] == ("init", "run") and wandb.calls[-1] == "finish"
    assert (0, ["validation/loss"]) in wandb.calls
    assert any(call[0] == 2 and "train/loss" in call[1] for call in wandb.calls[1:-1])


@pytest.mark.parametrize(
    ("name", "told"),
    [("wandb", {"exit_code": 1}), ("swanlab", {"state": "crashed", "error": "the roof fell in"}), ("trackio", {})],
)
def test_trackers_are_told_that_a_run_failed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: dict[str, Any]
) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    calls: list[Any] = []
    module.init = lambda **options: None  # type: ignore[attr-defined]
    module.log = lambda values, step: None  # type: ignore[attr-defined]
    module.finish = lambda **options: calls.append(options) or 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)

    def fall_in(event: Event) -> None:
        if isinstance(event, Step):
            raise RuntimeError("the roof fell in")

    with pytest.raises(RuntimeError, match="the roof fell in"):  # not that the tracker cannot be reached either
        train(place, tmp_path / "run", report_to=[name], on_event=fall_in)
    assert calls == [told]


def test_rows_from_python_are_learned_like_those_of_a_file(place: Path, tmp_path: Path) -> None:
    short = OPTIONS | {"training": replace(OPTIONS["training"], steps=4)}
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    control = Control()

    def watch(event: Event) -> None:
        if isinstance(event, Step) and event.step == 2:
            control.stop()

    model, run = str(place / "model"), tmp_path / "rows"
    stopped = finetune(model, rows, run, **short, on_event=watch, control=control)
    assert stopped.reason == "stopped" and "--config" not in str(stopped) and "with the same rows" in str(stopped)
    finetune(model, [row["messages"] for row in rows], run, **short)
    finetune(model, [str(place / "rows.jsonl")], tmp_path / "file", **short)
    assert weights(run) == weights(tmp_path / "file")
    assert yaml.safe_load((run / "config.yaml").read_text())["data"] is None
    assert "rows given in Python" in (run / "report.html").read_text()
    with pytest.raises(DataError, match="row:1: a row must be"):
        finetune(model, [3], tmp_path / "wrong", **short)
    assert not (tmp_path / "wrong").exists()
