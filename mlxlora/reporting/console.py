"""Progress on stderr: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mlxlora.files import human_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from mlxlora.training import events

PLAIN_SECONDS = 5.0  # without a terminal: at most one step line in so many seconds


class Console:
    """Shows progress and events; `progress` and `event` are the callbacks that verbs take."""

    def __init__(self) -> None:
        self.live = sys.stderr.isatty()
        self.bars: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.last_line = 0.0
        self.told: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()

    def progress(self, what: str, done: int, total: int) -> None:
        """One bar for each `what`; without a terminal one line when it begins."""
        if not self.live:
            if what not in self.told:
                self.told.add(what)
                print(f"{what} …", file=sys.stderr, flush=True)
            return
        bars = self.start()
        if what not in self.tasks:
            self.tasks[what] = bars.add_task(what, total=total or None, note="")
        bars.update(self.tasks[what], completed=done, total=total or None)

    def start(self) -> Progress:
        from rich import progress
        from rich.console import Console as RichConsole

        if self.bars is None:
            self.bars = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=24),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.fields[note]}"),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=RichConsole(stderr=True),
            )
            self.bars.start()
        return self.bars

    def say(self, line: str) -> None:
        if self.bars is not None:
            self.bars.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def event(self, event: events.Event) -> None:
        """Show one event of a run."""
        from mlxlora.training import events

        match event:
            case events.Started():
                share = 100 * event.trainable_parameters / max(event.total_parameters, 1)
                self.say(
                    f"training {event.trainable_parameters:,} of {event.total_parameters:,} parameters ({share:.2f} %) "
                    f"on {event.samples:,} samples for {event.steps:,} steps"
                    f"; memory at most {human_bytes(event.predicted_peak)} of {human_bytes(event.memory_limit)}"
                    + (f", going on after step {event.step:,}" if event.step else "")
                )
            case events.Step():
                self.step(event)
            case events.Validation():
                self.say(f"step {event.step:,}  validation loss {event.loss:.4f}{'  (best)' if event.best else ''}")
            case events.Notice():
                self.say(f"note: {event.message}")
            case events.Checkpoint() | events.Data() | events.Samples():
                pass
            case events.Finished():
                best = f", best validation loss {event.best_loss:.4f}" if event.best_loss is not None else ""
                self.say(f"finished after step {event.step:,} ({event.reason}) in {clock(event.elapsed)}{best}")

    def step(self, event: events.Step) -> None:
        note = (
            f"epoch {event.epoch:.2f}  loss {event.loss:.4f}  lr {event.learning_rate:.2e}  "
            f"{event.tokens_per_second:,.0f} tok/s  peak {human_bytes(event.peak_memory)}"
        )
        if event.best_loss is not None:
            note += f"  best {event.best_loss:.4f}"
        if self.live:
            bars = self.start()
            if "train" not in self.tasks:
                self.tasks["train"] = bars.add_task("train", total=event.steps, note="")
            bars.update(self.tasks["train"], completed=event.step, note=note)
        elif event.step == event.steps or time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            percent = 100 * event.step / event.steps
            self.say(
                f"{percent:3.0f} %  step {event.step:,}/{event.steps:,}  {note}  "
                f"{clock(event.elapsed)} elapsed, {clock(event.remaining)} left"
            )


def clock(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
