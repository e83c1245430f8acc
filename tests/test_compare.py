"""Base beside tuned: losses against `evaluate`, verdicts where the truth is known."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from mlxlora.adapters import AdapterConfig, collect, inject, save_adapter
from mlxlora.compare import compare
from mlxlora.data import SamplesConfig
from mlxlora.errors import ConfigError
from mlxlora.evaluate import evaluate
from mlxlora.finetune import finetune
from mlxlora.generate import SamplingConfig
from mlxlora.model import load
from mlxlora.training.config import TrainingConfig
from mlxlora.training.optimizer import OptimizerConfig
from tests import tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compare")
    tiny.model_directory(place / "model", "llama")
    tiny.chats(place / "rows.jsonl", 24)
    finetune(
        str(place / "model"), [str(place / "rows.jsonl")], place / "run",
        samples=SamplesConfig(validation_split=0.0), adapter=AdapterConfig(rank=4),
        optimizer=OptimizerConfig(learning_rate=2e-2), training=TrainingConfig(steps=30),
    )  # fmt: skip
    network = load(place / "model").network
    inject(network, AdapterConfig(rank=2))
    save_adapter(place / "zero", collect(network))
    return place


SHORT = SamplingConfig(max_tokens=6)


def test_a_tuned_model_is_better_and_its_losses_are_those_of_eval(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    found = compare(
        str(place / "model"), [str(place / "run")], place / "rows.jsonl", metrics=["exact"], sampling=SHORT, out=out
    )
    measured = evaluate(str(place / "model"), place / "rows.jsonl", adapter=[str(place / "run")])
    assert measured.adapted is not None
    loss = found.differences["tuned"]["loss"]
    assert loss.base == pytest.approx(measured.base.loss, rel=1e-5)
    assert loss.tuned == pytest.approx(measured.adapted.loss, rel=1e-5)
    assert loss.verdict == "better" and loss.difference < 0
    exact = found.differences["tuned"]["exact"]
    assert exact.base == 0.0 and exact.tuned > 0.9 and found.verdict == "better by exact"
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 24 and rows[3]["origin"].endswith("rows.jsonl:4") and rows[3]["expected"] == "the one"
    assert rows[3]["answers"]["tuned"] == "the one" and "exact" in str(found)


def test_an_adapter_without_effect_cannot_be_told_from_chance(place: Path) -> None:
    found = compare(str(place / "model"), [str(place / "zero")], place / "rows.jsonl")
    assert found.verdict == "cannot tell by loss" and found.differences["tuned"]["loss"].difference == 0.0
    # a run has a report; an adapter that is none can be talked to
    words = ["mlxlora", "chat", "--model", str(place / "model"), "--adapter", str(place / "zero")]
    assert shlex.split(found.next()) == words
    run = replace(found, adapter=[f"{place / 'run'}=0.5"])
    assert shlex.split(run.next()) == ["mlxlora", "report", str(place / "run")]
    assert replace(run, adapter=[*run.adapter, *found.adapter]).next().startswith("mlxlora chat")


def test_the_best_of_several_scales_is_named(place: Path) -> None:
    found = compare(
        str(place / "model"), [str(place / "run")], place / "rows.jsonl", scales=[0.1, 1.0, -1.0], max_rows=8
    )
    assert found.rows == 8 and found.best == "scale 1" and found.verdict == "better by loss; best with scale 1"
    assert found.differences["scale -1"]["loss"].verdict != "better"
    assert "--adapter" in found.next() and "=" not in found.next()
    half = replace(found, factor=0.5, adapter=["style=0.5", "facts=2"])
    assert half.next().startswith("mlxlora fuse ") and "--adapter style=0.25 facts --out" in half.next()
    alone = compare(str(place / "model"), [str(place / "run")], place / "rows.jsonl", scales=[0.5], max_rows=8)
    assert alone.best == "tuned" and f"{place / 'run'}=0.5" in shlex.split(alone.next())


def test_wrong_wishes_are_refused(place: Path, tmp_path: Path) -> None:
    model, run, rows = str(place / "model"), [str(place / "run")], place / "rows.jsonl"
    with pytest.raises(ConfigError, match="Did you mean 'exact'"):
        compare(model, run, rows, metrics=["exakt"])
    with pytest.raises(ConfigError, match="scales"):
        compare(model, run, rows, scales=[0.0])
    with pytest.raises(ConfigError, match="max_rows"):
        compare(model, run, rows, max_rows=1)
    (tmp_path / "one.jsonl").write_text((place / "rows.jsonl").read_text().splitlines()[0] + "\n")
    with pytest.raises(ConfigError, match="fewer than 2 rows"):
        compare(model, run, tmp_path / "one.jsonl")
