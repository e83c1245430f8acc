"""The search: it finds what works on a tiny model, does nothing twice, and draws a picture."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxlora import cli
from mlxlora.adapters import AdapterConfig
from mlxlora.data import SamplesConfig
from mlxlora.errors import ConfigError, RunError
from mlxlora.reporting.jsonl import read
from mlxlora.reporting.search import search_page
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Control
from mlxlora.trials import SearchConfig, combinations, suggestion
from mlxlora.tune import TuneResult, tune
from tests import tiny

SEARCH = SearchConfig(ranks=[2, 4], targets=["attention", "q_proj,v_proj"], trials=6, steps=4, range_steps=24)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tune")
    tiny.model_directory(place / "model", "llama")
    tiny.chats(place / "rows.jsonl", 40)
    return place


def search(place: Path, out: Path, **changes: Any) -> TuneResult:
    options: dict[str, Any] = {
        "search": SEARCH, "samples": SamplesConfig(validation_split=0.2), "adapter": AdapterConfig(rank=4, alpha=8.0),
        "training": TrainingConfig(batch_size=4),
    }  # fmt: skip
    return tune(str(place / "model"), [str(place / "rows.jsonl")], out, **(options | changes))


@pytest.fixture(scope="module")
def found(place: Path) -> TuneResult:
    return search(place, place / "out")


def test_rounds_halve_and_the_best_comes_first(found: TuneResult) -> None:
    assert found.reason == "done" and len(found.trials) == 6 and len(found.range_test) == 24
    assert [trial.round for trial in found.trials] == [2, 2, 1, 1, 1, 1]
    assert [trial.steps for trial in found.trials] == [12, 12, 4, 4, 4, 4]
    losses = [trial.loss for trial in found.trials if trial.loss is not None]
    assert losses[:2] == sorted(losses[:2]) and losses[2:] == sorted(losses[2:]) and max(losses[:2]) < min(losses[2:])
    assert found.suggested is not None and 1e-5 < found.suggested < 1e-1
    assert found.most_tokens > 1_000 and found.batch_size >= 1
    best = found.trials[0]
    assert f"--adapter.rank {best.rank} --adapter.alpha {2 * best.rank} " in found.flags
    assert str(found).splitlines()[-1].startswith("next: mlxlora train --config")


def test_nothing_is_done_twice(place: Path, found: TuneResult) -> None:
    seen: list[str] = []
    again = search(place, found.out, on_progress=lambda what, done, total: seen.append(what))
    assert (again.trials, again.flags, again.range_test) == (found.trials, found.flags, found.range_test)
    assert not [what for what in seen if "round" in what or "range" in what]


def test_a_stopped_search_goes_on_and_ends_at_the_same(place: Path, found: TuneResult, tmp_path: Path) -> None:
    control = Control()

    def stop(what: str, done: int, total: int) -> None:
        if what.startswith("round 1") and done == 6:
            control.stop()

    stopped = search(place, tmp_path / "out", on_progress=stop, control=control)
    assert stopped.reason == "stopped" and "goes on" in str(stopped) and not (tmp_path / "out" / "best.yaml").exists()
    assert search(place, tmp_path / "out").trials == found.trials


def test_a_part_of_the_data_is_enough(place: Path, tmp_path: Path) -> None:
    few = SearchConfig(
        learning_rates=[1e-3], ranks=[2], targets=["attention"], steps=2, rows=15, validation_rows=2
    )  # fmt: skip
    found = search(place, tmp_path / "out", search=few)
    trial = next((found.out / "round-1").iterdir())
    data = next(event for event in read(trial / "metrics.jsonl") if event["event"] == "data")
    assert data["samples"] + 3 == 15 and data["validation_samples"] == 2  # one of the three split off is not needed
    assert yaml.safe_load((found.out / "best.yaml").read_text())["data"] == [str(place / "rows.jsonl")]
    assert not [event for event in read(trial / "metrics.jsonl") if event["event"] == "samples"]
    said = "learned from 12 samples and validated on 2, drawn from the data named here (search.rows 15,"
    assert found.notices == ["there was one combination to try, so nothing was compared"]
    assert said in (trial / "config.yaml").read_text().splitlines()[0] and said in (trial / "report.html").read_text()


def test_what_it_found_trains(place: Path, found: TuneResult, capsys: pytest.CaptureFixture[str]) -> None:
    best = yaml.safe_load((found.out / "best.yaml").read_text())
    assert best["optimizer"]["learning_rate"] == found.trials[0].learning_rate
    arguments = ["--config", str(found.out / "best.yaml"), "--out", str(place / "run"), "--training.steps", "2"]
    assert cli.main(["train", *arguments]) == 0, capsys.readouterr().err


def test_the_picture_holds_both_charts(found: TuneResult) -> None:
    text = found.picture.read_text()
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    assert [chart["x_log"] for chart in charts] == [True, True] and "q_proj,v_proj" in text
    assert len(charts[1]["series"]) == len({(trial.rank, trial.targets) for trial in found.trials})
    trial = {"learning_rate": 1e-3, "rank": 4, "targets": "a<b", "round": 1, "steps": 3, "loss": math.inf}
    page = search_page("m", None, [], [trial])
    assert "blew up" in page and "a&lt;b" in page


def test_other_settings_or_another_directory_are_refused(place: Path, found: TuneResult, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"search\.steps"):
        search(place, found.out, search=SearchConfig(steps=9))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds no search"):
        search(place, tmp_path)
    with pytest.raises(ConfigError, match="validation"):
        search(place, tmp_path / "new", samples=SamplesConfig(validation_split=0.0))
    with pytest.raises(ConfigError, match="matches no module"):
        search(place, tmp_path / "new", search=SearchConfig(targets=["attention", "nothing"]))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"rows": 9},
        {"ranks": []},
        {"ranks": [0]},
        {"learning_rates": [0.0]},
        {"ranks": [8, 8]},
        {"targets": ["attention", "attention"]},
        {"learning_rates": [1.001e-3, 1.002e-3]},  # their trials would have one name
        {"reduction": 1},
        {"lowest": 1.0},
        {"steps": 0},
    ],
)
def test_searches_that_cannot_be_right_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"search\.\w+"):
        SearchConfig(**options)


def test_the_suggestion_lies_below_the_bottom() -> None:
    rates = [10 ** (-6 + place / 10) for place in range(50)]
    points = [(rate, 3 - 2 * math.exp(-((math.log10(rate) + 2.5) ** 2))) for rate in rates]
    found = suggestion(points)
    assert found is not None and 1e-4 < found < 1e-3
    assert suggestion([(rate, 3.0 + rate) for rate in rates]) is None and suggestion([]) is None


def test_too_many_combinations_are_drawn_from_and_always_the_same() -> None:
    config = SearchConfig(ranks=[1, 2, 3], trials=5)
    drawn = combinations([1e-4, 1e-3], config)
    assert len(drawn) == 5 and drawn == combinations([1e-4, 1e-3], config)
    assert len(combinations([1e-4], SearchConfig())) == 4
