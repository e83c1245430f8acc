"""A clock that is put back or leaps ahead in the midst of a run: nothing that is told or kept goes by it."""

import os
import time
from pathlib import Path

import pytest

from mlxlora.reporting.jsonl import read
from mlxlora.reporting.report import report
from mlxlora.training.events import Control, Event, Step
from tests import tiny
from tests.faults import session

HOUR = 3600.0
DAY = 24 * HOUR


@pytest.mark.parametrize("leap", [-HOUR, 100 * DAY])
def test_a_run_whose_clock_leaps_at_every_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leap: float) -> None:
    model, data = tiny.model_directory(tmp_path / "model", "qwen3"), session.rows(tmp_path / "data.jsonl")
    options = {**session.STOPPED, "samples.cache": tmp_path / "cache"}
    session.run(model, data, tmp_path / "calm", {**options, "samples.cache": tmp_path / "other"})
    for path in (model / "model.safetensors", data):  # copied from a machine whose clock is ahead
        os.utime(path, (time.time() + DAY,) * 2)
    now = [time.time()]

    def leaping() -> float:
        now[0] += leap
        return now[0]

    monkeypatch.setattr(time, "time", leaping)
    control = Control()

    def hear(event: Event) -> None:
        if isinstance(event, Step) and event.step == 4:
            control.stop()

    session.run(model, data, tmp_path / "run", options, control=control, on_event=hear)
    session.run(model, data, tmp_path / "run", options)  # goes on
    assert session.told(tmp_path / "run") == session.told(tmp_path / "calm")
    assert not [path.name for path in (tmp_path / "run").rglob("*.tmp-*")]
    steps = [event for event in read(tmp_path / "run" / "metrics.jsonl") if event["event"] == "step"]
    elapsed = [step["elapsed"] for step in steps]
    assert elapsed == sorted(elapsed) and 0 < elapsed[-1] < HOUR
    assert all(step["remaining"] >= 0 and step["tokens_per_second"] > 0 for step in steps)
    assert report([tmp_path / "run"], out=tmp_path / "page.html").report.is_file()
