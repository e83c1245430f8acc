"""The live panel of a run: how far, how well, how fast, how large; drawn in place, so nothing scrolls away."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mlxlora.files import human_bytes
from mlxlora.reporting.clock import clock
from mlxlora.terminal import visible
from mlxlora.training import events

if TYPE_CHECKING:
    from rich.console import RenderableType

BARS = "▁▂▃▄▅▆▇█"
CURVE = 40  # characters of the curve
KEPT = 4096  # points that are remembered for the curve
NEAR = 0.9  # of the memory limit: from here on the figure is red


class Curve:
    """A curve of any length in bounded memory: means over groups of equal size, which doubles when there are many."""

    def __init__(self) -> None:
        self.means: list[float] = []
        self.size = 1
        self.group: list[float] = []

    def add(self, value: float) -> None:
        """Take in one more value; what is no finite number is left out."""
        if not math.isfinite(value):
            return
        self.group.append(value)
        if len(self.group) == self.size:
            self.means.append(sum(self.group) / self.size)
            self.group = []
        if len(self.means) == KEPT:
            self.means = averages(self.means, KEPT // 2)
            self.size *= 2

    def __str__(self) -> str:
        return sparkline(self.means, CURVE)


class Panel:
    """What the events of a run came to so far, as one picture.

    now: the time in seconds, for tests
    """

    def __init__(self, started: events.Started, now: Callable[[], float] = time.monotonic) -> None:
        self.started, self.now = started, now
        self.step: events.Step | None = None
        self.first_validation: float | None = None
        self.validation: events.Validation | None = None
        self.saved = started.step
        self.answer = ""
        self.state = ""
        self.losses = Curve()
        self.seen = now()

    def show(self, event: events.Event) -> None:
        """Take in one event."""
        match event:
            case events.Step():
                self.step, self.seen = event, self.now()
                if event.applied:
                    self.losses.add(event.loss)
            case events.Validation():
                self.validation = event
                if event.step == 0:
                    self.first_validation = event.loss
            case events.Checkpoint():
                self.saved = event.step
            case events.Samples():
                if event.answers:
                    self.answer = visible(" ".join(event.answers[0].split()))
            case events.Finished():
                self.state = event.reason
            case _:
                pass

    def __rich__(self) -> RenderableType:
        from rich.panel import Panel as Frame
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True, min_width=len("learning rate"))
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for name, value in self.rows():
            grid.add_row(name, value if not isinstance(value, str) else Text(value))
        return Frame(grid, title=f"training {self.state}".rstrip(), title_align="left", border_style="dim")

    def rows(self) -> list[tuple[str, RenderableType]]:
        """(name, what it is now), one for each line of the panel."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        step, steps = self.step, self.started.steps
        done = step.step if step else self.started.step
        bar = Table.grid(padding=(0, 2))
        bar.add_column(no_wrap=True)
        bar.add_column(no_wrap=True, overflow="ellipsis")
        bar.add_row(
            ProgressBar(total=steps, completed=done, width=CURVE // 2),
            f"{100 * done / max(steps, 1):.0f} %  step {done:,} of {steps:,}",
        )
        rows: list[tuple[str, RenderableType]] = [("progress", bar)]
        if step is None:
            rows.append(("", "validating before the first step …" if not self.validation else "the first step …"))
        else:
            passed = 0.0 if self.state else self.now() - self.seen
            left = max(step.remaining - passed, 0)
            rows += [
                ("time", f"{clock(step.elapsed + passed)} elapsed, about {clock(left)} left   epoch {step.epoch:.2f}"),
                ("loss", f"{self.losses}  {step.loss:.4f}"),
            ]
        if self.validation is not None:
            rows.append(("validation", self.validated()))
        if step is not None:
            rows += [
                ("learning rate", f"{step.learning_rate:.2e}   gradient norm {step.grad_norm:.3g}"),
                ("tokens/s", f"{step.tokens_per_second:,.0f} trained, {step.processed_per_second:,.0f} processed"),
                ("memory", self.memory(step)),
            ]
        if self.answer:
            rows.append(("it says", self.answer))
        rows.append(("saved", f"step {self.saved:,}" if self.saved else "not yet"))
        return rows

    def validated(self) -> str:
        assert self.validation is not None
        text = f"{self.validation.loss:.4f} at step {self.validation.step:,}"
        if self.validation.best_loss is not None:
            text += f"   best {self.validation.best_loss:.4f}"
        if self.first_validation is not None and self.validation.step:
            text += f"   before {self.first_validation:.4f}"
        return text

    def memory(self, step: events.Step) -> RenderableType:
        """Now and at the peak, against the limit; red when there is little room."""
        from rich.text import Text

        text = f"{human_bytes(step.memory)} now, {human_bytes(step.peak_memory)} at the peak"
        limit = self.started.memory_limit
        if not limit:
            return Text(text)
        share = step.peak_memory / limit
        return Text(f"{text} of {human_bytes(limit)} ({100 * share:.0f} %)", style="bold red" if share > NEAR else "")


def averages(values: Sequence[float], count: int) -> list[float]:
    """`values` in `count` groups of neighbours, each as its mean; as they are where there are no more than that."""
    if len(values) <= count:
        return list(values)
    edges = [round(place * len(values) / count) for place in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of at most `width` characters, from the lowest value to the highest."""
    shown = averages(values, width)
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)
