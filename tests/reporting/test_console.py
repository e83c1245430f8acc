"""What a person sees while a run goes on: one panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as Terminal

from mlxlora.reporting.console import Console
from mlxlora.reporting.foretold import foretold
from mlxlora.reporting.panel import CURVE, KEPT, Curve, Panel, averages, sparkline
from mlxlora.training import events


def started(**changes: Any) -> events.Started:
    values: dict[str, Any] = {
        "step": 0, "steps": 100, "epochs": 2.0, "samples": 400, "trainable_parameters": 10, "total_parameters": 1_000,
        "predicted_peak": 2 * 10**9, "memory_limit": 8 * 10**9,
    }  # fmt: skip
    return events.Started(**(values | changes))


def step(number: int, loss: float = 1.0, **changes: Any) -> events.Step:
    values: dict[str, Any] = {
        "step": number, "steps": 100, "epoch": number / 50, "loss": loss, "learning_rate": 2e-4, "grad_norm": 0.5,
        "tokens": number * 10, "tokens_per_second": 1_234.0, "processed_per_second": 4_321.0, "samples": number * 4,
        "memory": 10**9, "peak_memory": 2 * 10**9, "elapsed": number * 1.5, "remaining": (100 - number) * 1.5,
        "best_loss": None,
    }  # fmt: skip
    return events.Step(**(values | changes))


def validation(number: int, loss: float, best: float | None = None) -> events.Validation:
    return events.Validation(number, number / 50, loss, 300, best, best == loss, 1.0)


def drawn(panel: Panel, width: int = 100) -> str:
    terminal = Terminal(file=io.StringIO(), width=width)
    terminal.print(panel)
    return str(terminal.file.getvalue())  # type: ignore[attr-defined]


def test_the_panel_tells_everything() -> None:
    panel = Panel(started(), now=lambda: 0.0)
    assert "validating before the first step" in drawn(panel)
    panel.show(validation(0, 3.5))
    for number in range(1, 41):
        panel.show(step(number, loss=4.0 - number / 20))
    panel.show(validation(40, 2.25, best=2.25))
    panel.show(events.Checkpoint(40, Path("x"), True))
    panel.show(events.Samples(40, ["Who?"], ["It is\n  I."], ["I."]))
    text = drawn(panel)
    for word in (
        "40 %", "step 40 of 100", "1 min 00 s elapsed, about 1 min 30 s left", "epoch 0.80", "2.0000",
        "2.2500 at step 40", "best 2.2500", "before 3.5000", "2.00e-04",
        "1,234 trained, 4,321 processed", "1.0 GB now, 2.0 GB at the peak",
        "of 8.0 GB (25 %)", "It is I.", "saved", "█▇",
    ):  # fmt: skip
        assert word in text, f"{word} is missing in\n{text}"


def test_what_was_foretold_in_words() -> None:
    told = started(predicted_seconds=750.0, predicted_tokens_per_second=1234.5, chosen="batches of 4", why="it fits")
    assert foretold(told) == "peak 2.0 GB of 8.0 GB, about 12 min 30 s at 1,234 tokens/s (batches of 4: it fits)"
    assert foretold(replace(told, step=80)).startswith("peak 2.0 GB of 8.0 GB, about 2 min 30 s")
    assert foretold(started(predicted_peak=0)) == "" and foretold(started()) == "peak 2.0 GB of 8.0 GB"


def test_between_steps_the_clock_goes_on() -> None:
    time = [0.0]
    panel = Panel(started(), now=lambda: time[0])
    panel.show(step(10))
    time[0] = 45.0
    assert "1 min 00 s elapsed, about 1 min 30 s left" in drawn(panel)


@pytest.mark.parametrize("width", [40, 60, 200])
def test_the_panel_keeps_its_height_at_every_width(width: int) -> None:
    panel = Panel(started(), now=lambda: 0.0)
    panel.show(step(1))
    panel.show(events.Samples(1, ["?"], ["word " * 200], [""]))
    lines = drawn(panel, width).splitlines()
    assert len(lines) == len(panel.rows()) + 2 and all(len(line) <= width for line in lines)


def test_little_room_is_red() -> None:
    panel = Panel(started(memory_limit=2_100_000_000), now=lambda: 0.0)
    assert "red" in str(panel.memory(step(1)).style) and not panel.memory(step(1, peak_memory=10**9)).style  # type: ignore[union-attr]
    assert "of" not in str(Panel(started(memory_limit=0)).memory(step(1)))


def test_curves() -> None:
    assert sparkline([3.0, 2.0, 1.0], 40) == "█▅▁" or sparkline([3.0, 2.0, 1.0], 40) == "█▄▁"
    assert sparkline([1.0] * 5, 3) == "▁▁▁" and sparkline([], 9) == ""
    assert len(sparkline([float(number % 7) for number in range(1_000)], CURVE)) == CURVE
    curve = Curve()
    for value in (float("nan"), 2.0, float("inf"), 1.0):
        curve.add(value)
    assert str(curve) == "█▁"
    assert averages([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]


def test_a_long_run_needs_no_more_memory() -> None:
    panel = Panel(started(steps=10**6))
    for number in range(1, 3 * KEPT):
        panel.show(step(number, loss=float(3 * KEPT - number)))
    assert len(panel.losses.means) <= KEPT and sparkline(panel.losses.means, 8) == "█▇▆▅▄▃▂▁"


def test_on_a_terminal_only_notices_scroll() -> None:
    file = io.StringIO()
    with Console(Terminal(file=file, force_terminal=True, width=100, height=40, _environ={})) as console:
        console.progress("tokenising", 1, 2)
        console.event(started())
        console.event(validation(0, 3.0))
        for number in range(1, 101):
            console.event(step(number))
        console.event(events.Notice(50, "3 samples [left] out"))
        console.event(validation(100, 2.0, 2.0))
        console.event(events.Finished(100, 2.0, "done", 1.0, 2.0, 100, 150.0, 2 * 10**9))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "note: 3 samples [left] out" in text and "training done" in text
    assert text.index("plan: peak 2.0 GB of 8.0 GB") < text.index("╭")
    assert "validation loss" not in text and "\x1b[1A" in file.getvalue()
    last = text[text.rindex("╭") :]
    assert "step 100 of 100" in last and "2.0000 at step 100" in last and "before 3.0000" in last


def test_without_a_terminal_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Console() as console:
        console.progress("tokenising", 1, 2)
        console.event(started())
        console.event(step(1))
        console.event(step(2))
        console.event(validation(2, 2.5, 2.5))
        console.event(step(100))
    text = capsys.readouterr().err
    assert text.index("plan: peak 2.0 GB of 8.0 GB") < text.index("training 10 of 1,000 parameters")
    assert "\x1b" not in text and "tokenising …" in text and "validation loss 2.5000  (best)" in text
    assert "step 1/100" in text and "step 2/100" not in text and "100 %  step 100/100" in text
    assert "  4,321 tok/s  " in text  # counted as the plan's, and not the trained ones alone


@pytest.mark.parametrize("kind", ["dumb", "", "unknown"])
def test_a_terminal_that_cannot_draw_gets_lines(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", kind)
    assert not Console().live
    monkeypatch.setenv("TERM", "xterm")
    assert Console().live
