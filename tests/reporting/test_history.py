"""What a report keeps of a run: bounded however long the run is, and true to its events."""

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mlxlora.reporting.history import KEPT, NOTICES, History, Points
from mlxlora.reporting.jsonl import read
from mlxlora.reporting.page import smooth
from mlxlora.reporting.report import report
from tests.reporting.test_report import make_run


def step(number: int, loss: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "event": "step", "step": number, "steps": 10**6, "epoch": 0.5, "loss": loss, "learning_rate": 1e-4,
        "grad_norm": 1.0 / number, "tokens": number, "processed_per_second": 9.5, "peak_memory": 100 + number,
        "elapsed": number * 0.1,
    } | more  # fmt: skip


@pytest.mark.parametrize("count", [1, 7, KEPT, KEPT + 1, 5 * KEPT + 3])
def test_a_curve_keeps_its_ends_and_evenly_chosen_points_between(count: int) -> None:
    points = Points()
    for x in range(count):
        points.add(x, 2.0 * x)
    found = points.all()
    xs = [x for x, _ in found]
    assert (xs[0], xs[-1]) == (0, count - 1) and len(found) <= KEPT + 1 and len(found) >= min(count, KEPT // 2)
    assert all(value == 2.0 * x for x, value in found) and xs == sorted(set(xs))
    gaps = {b - a for a, b in pairwise(xs[:-1])}
    assert len(gaps) <= 1


def test_what_is_kept_does_not_grow_with_the_run() -> None:
    history = History()
    tracemalloc.start()
    try:
        seen = []
        for number in range(1, 12 * KEPT):
            history.add(step(number))
            if number % KEPT == 0:
                history.add({"event": "notice", "step": number, "message": f"at {number}"})
                history.add({"event": "samples", "step": number, "prompts": ["a"] * 9, "answers": ["b" * 99] * 9})
                seen.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert max(seen[3:]) <= max(seen[:3]) * 1.05, seen
    assert history.peak == 100 + number and len(history.looks) == 2


def test_notices_beyond_measure_are_counted() -> None:
    history = History({"event": "notice", "step": n, "message": str(n)} for n in range(NOTICES + 5))
    assert history.notices[:2] == ["0", "1"] and history.notices[-1] == "and 5 more, in metrics.jsonl"


def test_the_curves_are_those_of_the_events(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    events = list(read(run / "metrics.jsonl"))
    history = History(events)
    losses = [(event["step"], event["loss"]) for event in events if event["event"] == "step"]
    assert history.curves["loss"].all() == losses and history.curves["smoothed"].all() == smooth(losses)
    held_out = [(event["step"], event["loss"]) for event in events if event["event"] == "validation"]
    assert history.validations.all() == held_out and history.baseline == held_out[0][1]
    assert history.best == min(held_out[1:], key=lambda point: point[1])


STRANGE: list[dict[str, Any]] = [
    {"event": "step"}, {"event": ["step"]}, {"event": None}, step(1, loss="NaN"),  # type: ignore[arg-type]
    step(1, peak_memory="much"), step(1, peak_memory=1e400), step(1, step=None), step(1, elapsed=[1]),
    {"event": "started", "step": 0}, {"event": "validation", "step": "1", "loss": 2.0},
    {"event": "samples", "step": 3, "prompts": 5, "answers": ["a"]},
    {"event": "samples", "step": 3, "prompts": [["a"]], "answers": ["a"]}, {"event": "notice"},
    {"event": "data", "samples": 1, "histogram_edges": ["a", "b"], "histogram_counts": [1, 2]}, {"event": "finished"},
]  # fmt: skip


@pytest.mark.parametrize("event", STRANGE, ids=lambda event: json.dumps(event)[:40])
def test_an_event_that_no_run_writes_is_passed_over(tmp_path: Path, event: dict[str, Any]) -> None:
    run = make_run(tmp_path / "run")
    before = report([run]).report.read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n" + json.dumps(event) + "\n")
    after = report([run]).report.read_text()
    assert after == before or event["event"] in ("notice", "finished")
