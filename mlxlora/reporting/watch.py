"""Events on their way: to metrics.jsonl, the report, trackers and the caller; and what a run came to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mlxlora.commands import command
from mlxlora.data import DataSplits
from mlxlora.files import plain
from mlxlora.reporting.history import History
from mlxlora.reporting.jsonl import append
from mlxlora.reporting.report import report_of
from mlxlora.reporting.said import Said, said, shortened
from mlxlora.reporting.trackers import Tracker
from mlxlora.training.events import Checkpoint, Data, Event, Finished, Notice, Reason, Validation
from mlxlora.training.run import RunDirectory


@dataclass(frozen=True)
class FinetuneResult:
    """What a run came to."""

    run: Path
    adapter: Path
    """the adapter to use: that of the lowest validation loss, or the last one where there was no validation"""
    reason: Reason
    step: int
    epoch: float
    loss: float | None
    """of the last step"""
    baseline_loss: float | None
    """validation loss before the first step"""
    best_loss: float | None
    """lowest validation loss"""
    best_step: int | None
    seconds: float
    peak_memory: int
    model: str
    said: list[Said]
    """answers to a few held-out prompts, before and after"""
    notices: list[str]
    rows_given: bool = False
    """whether the data was rows in Python, which no command can name"""
    moved: bool = False
    """whether its directory was renamed while it wrote to it: `run` is where it stands now"""

    def __str__(self) -> str:
        same = f"the same {'call' if self.rows_given else 'command'}{' with its new place' if self.moved else ''}"
        why = {
            "done": "finished",
            "stopped": f"stopped and saved; {same} goes on from here",
            "patience": "finished: validation stopped getting better",
            "target_loss": "finished: the target loss is reached",
            "max_minutes": "finished: the time is up",
        }[self.reason]
        lines = [f"{why} at step {self.step:,}, epoch {self.epoch:.2f}"]
        if self.best_loss is not None and self.baseline_loss is not None:
            best = f"{self.best_loss:.4f} at best (step {self.best_step:,})"
            lines.append(f"validation loss {self.baseline_loss:.4f} before, {best}")
        lines += self.example()
        lines.append(f"adapter: {self.adapter}")
        if self.reason != "stopped":
            lines += ["", f"next: {command('chat', model=self.model, adapter=self.run)}"]
        elif self.rows_given:
            there = f", and out={str(self.run)!r}" if self.moved else ""
            lines += ["", f"next: the same call of `finetune`, with the same rows{there}"]
        else:
            place = {"out": self.run} if self.moved else {}  # config.yaml names the place where the run began
            lines += ["", f"next: {command('train', config=self.run / 'config.yaml', **place)}"]
        return "\n".join(lines)

    def example(self) -> list[str]:
        """One prompt and its answers; the report has them all."""
        one = next((one for one in self.said if one.before is not None and one.after is not None), None)
        if one is None:
            return []
        told = {"asked": one.prompt, "before": one.before or "", "after": one.after or "", "in the data": one.expected}
        return [f"  {name:<13}{shortened(text) or '(nothing)'}" for name, text in told.items()]


class Watch:
    """Passes events on to metrics.jsonl, the report, trackers and the caller; remembers what the result tells.

    Trackers are closed at the end of the `with` block, and told where an error broke the run off.
    """

    def __init__(
        self, run: RunDirectory, on_event: Callable[[Event], None] | None, begin: Callable[[], Sequence[Tracker]]
    ) -> None:
        self.run, self.on_event, self.begin = run, on_event, begin
        self.begun_at = self.place = run.path
        self.trackers: Sequence[Tracker] | None = None
        self.history = History()
        self.notices: list[str] = []
        self.told = 0
        self.finished: Finished | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # what broke the run off says more than a tracker that cannot be reached any more
        quiet = contextlib.suppress(Exception) if error is not None else contextlib.nullcontext()
        with quiet, contextlib.ExitStack() as stack:
            for tracker in self.trackers or ():
                stack.callback(tracker.close, error)

    def __call__(self, event: Event) -> None:
        if self.trackers is None:
            self.trackers = self.begin()
            self.history = History.of(self.run.metrics_path)  # of the parts of the run before this one
        self.run.follow()
        if self.run.path != self.place:
            self.notices.append(f"{self.place} was moved to {self.run.path}: the run goes on there")
            self.place = self.run.path
        step = event.step
        if isinstance(event, Data):  # what is foretold comes first, then what is to be said of it
            self.pass_on(event)
            return
        pending = [Notice(step, text) for text in self.notices[self.told :]]
        self.told = len(self.notices)
        for one in (event, *pending):
            self.pass_on(one)

    def pass_on(self, event: Event) -> None:
        """Hand one event to everybody who listens. Raises TrainingError where the run's directory is gone."""
        if not isinstance(event, Checkpoint):
            self.history.add(self.run.written(lambda: append(self.run.metrics_path, event)))
        if isinstance(event, Finished):
            self.finished = event
        if isinstance(event, Validation | Finished):
            self.run.written(lambda: report_of(self.run.path, self.history))
        for tracker in self.trackers or ():
            tracker(event)
        if self.on_event:
            self.on_event(event)

    def result(self, model: str, *, rows_given: bool) -> FinetuneResult:
        """What the run came to, once it has ended; a run that is not merely stopped is marked as finished."""
        run, finished = self.run, self.finished
        assert finished is not None
        result = FinetuneResult(
            run=run.path,
            adapter=run.best_path if run.best_path.exists() else run.adapter_path,
            reason=finished.reason,
            step=finished.step,
            epoch=finished.epoch,
            loss=finished.loss,
            baseline_loss=self.history.baseline,
            best_loss=finished.best_loss,
            best_step=finished.best_step,
            seconds=finished.elapsed,
            peak_memory=finished.peak_memory,
            model=model,
            said=said(self.history.looks),
            notices=self.notices,
            rows_given=rows_given,
            moved=run.path != self.begun_at,
        )
        if finished.reason != "stopped":
            run.finish(plain(result))
        return result


def describe(splits: DataSplits) -> Data:
    """Counts and a histogram of the samples to learn from."""
    train = splits.train
    counts, edges = np.histogram(train.lengths, bins=min(30, int(train.lengths.max())), range=(0, train.lengths.max()))
    return Data(
        step=0,
        samples=len(train),
        validation_samples=len(splits.valid) if splits.valid is not None else 0,
        tokens=int(train.lengths.sum()),
        trained_tokens=int(train.trained.sum()),
        shortest=int(train.lengths.min()),
        longest=int(train.lengths.max()),
        histogram_edges=[round(edge) for edge in edges[:-1]],
        histogram_counts=counts.tolist(),
    )


def left_out(splits: DataSplits) -> list[str]:
    """What a person should know of the rows that are not learned as they stand, one line a split and reason."""
    lines = []
    for name, counts in splits.counts.items():
        for number, what in (
            (counts.truncated, "cut to samples.max_length"),
            (counts.dropped, "left out: longer than samples.max_length"),
            (counts.short, "left out: shorter than samples.min_length"),
            (counts.unlocated, "left out: the answer could not be located in the chat template's text"),
            (counts.untrained, "left out: nothing in them is learned"),
            (counts.unended, "learned without a token that ends the turn"),
            (counts.dropped_thinking, "turns whose reasoning the chat template leaves out"),
        ):
            if number:
                lines.append(f"{name}: {number:,} of {counts.rows:,} rows {what}")
    return lines
