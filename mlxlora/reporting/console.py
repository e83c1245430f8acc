"""Progress on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlxlora.files import human_bytes
from mlxlora.reporting.clock import clock
from mlxlora.reporting.foretold import foretold
from mlxlora.reporting.said import shortened
from mlxlora.terminal import visible

if TYPE_CHECKING:
    from rich.console import Console as Terminal
    from rich.live import Live
    from rich.progress import Progress, TaskID

    from mlxlora.reporting.panel import Panel
    from mlxlora.training import events

PLAIN_SECONDS = 5.0  # without a terminal: at most one step line in so many seconds


class Console:
    """Shows progress and events; `progress` and `event` are the callbacks that verbs take.

    terminal: where to draw; default stderr, drawn on only where it is a terminal that can move its cursor
    """

    def __init__(self, terminal: Terminal | None = None) -> None:
        self.live = terminal is not None or (
            sys.stderr.isatty() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")
        )
        self.terminal = terminal
        self.bars: Progress | None = None
        self.panel: Panel | None = None
        self.drawing: Live | None = None
        self.tasks: dict[str, TaskID] = {}
        self.last_line = 0.0
        self.told: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave what is drawn as it stands and draw no more."""
        if self.drawing is not None:
            self.drawing.stop()
        if self.bars is not None:
            self.bars.stop()
        self.drawing, self.bars, self.tasks = None, None, {}

    def screen(self) -> Terminal:
        from rich.console import Console as Terminal

        if self.terminal is None:
            self.terminal = Terminal(stderr=True)
        return self.terminal

    def progress(self, what: str, done: int, total: int) -> None:
        """One bar for each `what`; without a terminal one line when it begins."""
        if not self.live:
            if what not in self.told:
                self.told.add(what)
                print(f"{what} …", file=sys.stderr, flush=True)
            return
        if self.drawing is not None:  # the panel has the screen
            return
        bars = self.start()
        if what not in self.tasks:
            self.tasks[what] = bars.add_task(what, total=total or None)
        bars.update(self.tasks[what], completed=done, total=total or None)

    def start(self) -> Progress:
        from rich import progress

        if self.bars is None:
            self.bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=self.screen(),
            )
            self.bars.start()
        return self.bars

    def say(self, line: str) -> None:
        line = visible(line)
        if self.live:
            self.screen().print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def draw(self, event: events.Event) -> None:
        """On a terminal: everything in the panel, which stays in its place; only notices are lines of their own."""
        from rich.live import Live

        from mlxlora.reporting.panel import Panel
        from mlxlora.training import events

        if isinstance(event, events.Started):
            self.stop()
            if text := foretold(event):
                self.say(f"plan: {text}")
            self.panel = Panel(event)
            self.drawing = Live(self.panel, console=self.screen(), refresh_per_second=4)
            self.drawing.start()
        if self.panel is not None:
            self.panel.show(event)
        if isinstance(event, events.Notice):
            self.say(f"note: {event.message}")
        if isinstance(event, events.Finished):
            self.stop()

    def event(self, event: events.Event) -> None:
        """Show one event of a run."""
        from mlxlora.training import events

        if self.live:
            self.draw(event)
            return
        match event:
            case events.Started():
                if text := foretold(event):
                    self.say(f"plan: {text}")
                share = 100 * event.trainable_parameters / max(event.total_parameters, 1)
                self.say(
                    f"training {event.trainable_parameters:,} of {event.total_parameters:,} parameters ({share:.2f} %) "
                    f"on {event.samples:,} samples for {event.steps:,} steps"
                    + (f", going on after step {event.step:,}" if event.step else "")
                )
            case events.Step():
                self.step(event)
            case events.Validation():
                self.say(f"step {event.step:,}  validation loss {event.loss:.4f}{'  (best)' if event.best else ''}")
            case events.Notice():
                self.say(f"note: {event.message}")
            case events.Samples() if event.prompts:
                self.say(f"step {event.step:,}  asked: {shortened(event.prompts[0])}")
                self.say(f"step {event.step:,}  it says: {shortened(event.answers[0]) or '(nothing)'}")
            case events.Checkpoint() | events.Data() | events.Samples():
                pass
            case events.Finished():
                best = f", best validation loss {event.best_loss:.4f}" if event.best_loss is not None else ""
                self.say(f"finished after step {event.step:,} ({event.reason}) in {clock(event.elapsed)}{best}")

    def step(self, event: events.Step) -> None:
        note = (
            f"epoch {event.epoch:.2f}  loss {event.loss:.4f}  lr {event.learning_rate:.2e}  "
            f"{event.processed_per_second:,.0f} tok/s  peak {human_bytes(event.peak_memory)}"
        )
        if event.best_loss is not None:
            note += f"  best {event.best_loss:.4f}"
        if event.step == event.steps or time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            percent = 100 * event.step / event.steps
            self.say(
                f"{percent:3.0f} %  step {event.step:,}/{event.steps:,}  {note}  "
                f"{clock(event.elapsed)} elapsed, {clock(event.remaining)} left"
            )
