"""What a report tells of a run's events, in memory that does not grow with the run."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlxlora.reporting.jsonl import read
from mlxlora.reporting.page import POINTS, Smoothing

CURVES = ("loss", "learning_rate", "grad_norm", "processed_per_second", "peak_memory")  # of the steps
KEPT = POINTS  # of a curve: what a chart draws
NOTICES = 200  # that are told; of the rest their number
# what must be a number in an event that is believed; and what may be one, or missing
NEEDED = {
    "step": ("step", "steps", "epoch", "tokens", "elapsed", "peak_memory"),
    "validation": ("step",),
    "samples": ("step",),
    "started": ("step", "steps", "epochs", "samples", "trainable_parameters", "total_parameters"),
    "data": ("samples", "validation_samples", "tokens", "trained_tokens", "shortest", "longest"),
}
OPTIONAL = {
    "step": ("loss", "learning_rate", "grad_norm", "processed_per_second"),
    "validation": ("loss",),
    "started": ("predicted_peak", "memory_limit", "predicted_seconds", "predicted_tokens_per_second"),
}
LISTS = {"samples": ("prompts", "answers"), "data": ("histogram_edges", "histogram_counts")}


class Points:
    """A curve of any length: every n-th point and the last. n doubles when there are too many."""

    def __init__(self) -> None:
        self._xs, self._values = array("d"), array("d")  # a gap is a value that is no number
        self._every, self._seen = 1, 0
        self._last: tuple[float, float] | None = None

    def add(self, x: float, value: float | None) -> None:
        """One more point; None is a gap."""
        self._last = (float(x), math.nan if value is None else float(value))
        if self._seen % self._every == 0:
            if len(self._xs) == KEPT:
                self._xs, self._values = self._xs[::2], self._values[::2]
                self._every *= 2
            for kept, number in zip((self._xs, self._values), self._last, strict=True):
                kept.append(number)
        self._seen += 1

    def all(self) -> list[tuple[float, Any]]:
        """What is left of the curve, from its first point to its last."""
        points = list(zip(self._xs, self._values, strict=True))
        if self._last is not None and (self._seen - 1) % self._every:
            points.append(self._last)
        return [(int(x) if x.is_integer() else x, None if math.isnan(value) else value) for x, value in points]


class History:
    """The events of a run as its report tells them.

    curves:    the fields `CURVES` of its steps, and `smoothed`, the loss
    looks:     the first and the last event with answers
    best:      (step, loss) of the lowest validation loss after any step
    baseline:  the validation loss before the first step
    """

    def __init__(self, events: Iterable[dict[str, Any]] = ()) -> None:
        self.curves = {name: Points() for name in (*CURVES, "smoothed")}
        self.validations = Points()
        self.data: dict[str, Any] = {}
        self.started: dict[str, Any] = {}
        self.step: dict[str, Any] = {}
        self.finished: dict[str, Any] = {}
        self.looks: list[dict[str, Any]] = []
        self.best: tuple[float, float] | None = None
        self.baseline: float | None = None
        self.peak = 0
        self._smoothing = Smoothing()
        self._notices: list[str] = []
        self._more = 0
        for event in events:
            self.add(event)

    @classmethod
    def of(cls, metrics: Path) -> History:
        """That of a metrics.jsonl, which may be missing."""
        return cls(read(metrics))

    def add(self, event: dict[str, Any]) -> None:
        """Take in one more. An event that is not as a run writes it is passed over."""
        if not believed(event):
            return
        match event["event"]:
            case "step":
                self._step(event)
            case "validation":
                self._validation(event["step"], event.get("loss"))
            case "samples" if event["prompts"]:
                self.looks = [*self.looks[:1], event]
            case "notice":
                self._notice(str(event.get("message", "")))
            case "started" if not self.started:  # what follows are later parts of the same run
                self.started = event
            case "data":
                self.data = event
            case "finished":
                self.finished = event
            case _:
                pass

    def _step(self, event: dict[str, Any]) -> None:
        self.step = event
        self.peak = max(self.peak, event["peak_memory"])
        for name in CURVES:
            self.curves[name].add(event["step"], event.get(name))
        self.curves["smoothed"].add(event["step"], self._smoothing.take(event.get("loss")))

    def _validation(self, step: float, loss: float | None) -> None:
        self.validations.add(step, loss)
        if step == 0:
            self.baseline = loss
        elif loss is not None and (self.best is None or loss < self.best[1]):
            self.best = (step, loss)

    def _notice(self, message: str) -> None:
        if len(self._notices) < NOTICES:
            self._notices.append(message)
        else:
            self._more += 1

    @property
    def notices(self) -> list[str]:
        """What a person was told."""
        return self._notices + ([f"and {self._more:,} more, in metrics.jsonl"] if self._more else [])


def believed(event: dict[str, Any]) -> bool:
    """Whether the fields that a report tells are of their types: anybody may have written the file."""
    kind = str(event["event"])
    return (
        all(_is_number(event.get(name)) for name in NEEDED.get(kind, ()))
        and all(event.get(name) is None or _is_number(event[name]) for name in OPTIONAL.get(kind, ()))
        and all(isinstance(event.get(name), list) for name in LISTS.get(kind, ()))
        and all(OF[kind](value) for name in LISTS.get(kind, ()) for value in event[name])
    )


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -math.inf < value < 1e300  # type: ignore[operator]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


OF = {"samples": _is_text, "data": _is_number}  # what the items of `LISTS` are
