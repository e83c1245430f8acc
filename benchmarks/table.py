"""The table of docs/benchmarks.md: a row for each contestant, with what it is against the three rivals."""

from __future__ import annotations

import math
from collections.abc import Iterable

from benchmarks.arena import Result
from benchmarks.scenarios import OURS, PEFT, PEFT_CHECKPOINT, SHIPPED, STEP, Scenario

COLUMNS = (
    "scenario", "contestant", "memory above the weights", "against mlx-lm's trainer", "against its step",
    "against PyTorch + PEFT", "of the floor", "loss", "Δ loss", "Δ gradients",
)  # fmt: skip
RIVALS = (SHIPPED, STEP, PEFT)  # in the order of those columns


def header() -> list[str]:
    """The first two lines."""
    return [_line(COLUMNS), "|" + "---|" * len(COLUMNS)]


def rows(scenario: Scenario, results: Iterable[Result]) -> list[str]:
    """The rows of a scenario; its title stands in the first."""
    found = {result.name: result for result in results}
    return [_row("" if place else scenario.title, result, found) for place, result in enumerate(found.values())]


def _row(title: str, result: Result, found: dict[str, Result]) -> str:
    if result.failure:
        return _line([title, result.name, result.failure] + [""] * (len(COLUMNS) - 3))
    against = [_against(result, found.get(rival)) if rival in _rivals(result.name) else "" for rival in RIVALS]
    numbers = [_number(result.floor_share * 100, ".0f", " %"), _number(result.loss, ".4f")]
    errors = [_number(error, ".0e").replace("e-0", "e-") for error in (result.loss_error, result.gradient_error)]
    return _line([title, result.name, _number(result.memory / 1e6, ",.0f", " MB"), *against, *numbers, *errors])


def _rivals(name: str) -> tuple[str, ...]:
    """With whom this one is compared: ours with everybody, all others with mlx-lm's step."""
    if name in OURS:
        return RIVALS
    return (STEP, PEFT) if name == PEFT_CHECKPOINT else (STEP,)


def _against(result: Result, rival: Result | None) -> str:
    """Trained tokens in the same time, and in brackets the memory, as multiples of the rival's."""
    if rival is None or rival.failure:
        return ""
    if rival is result:
        return "1 (1)"
    speed = result.trained / result.seconds / (rival.trained / rival.seconds)
    less = rival.memory / result.memory
    return f"{speed:.2f} (1/{less:.1f})" if less >= 1 else f"{speed:.2f} ({1 / less:.1f})"


def _number(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else format(value, form) + unit


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"
