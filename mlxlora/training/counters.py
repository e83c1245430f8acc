"""What the training loop remembers: steps on their way to the device, and what a run counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import mlx.core as mx

from mlxlora.errors import RunError

LARGEST = 1 << 53  # of a number that a run counts, or measures


@dataclass(slots=True)
class Pending:
    """A step whose numbers have not been read yet."""

    step: int
    epoch: float
    loss: mx.array
    norm: mx.array
    finite: mx.array
    trained: int
    processed: int
    samples: int
    planned: list[Any]


@dataclass
class Counters:
    """What a run remembers beside its arrays; saved with every checkpoint."""

    tokens: int = 0
    samples: int = 0
    skipped: int = 0
    elapsed: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    without_better: int = 0
    owes_validation: bool = False
    """a stop came before the validation of this step was through"""
    losses: list[float] = field(default_factory=list)
    """of the last 50 steps"""

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Self:
        """From a checkpoint. Raises RunError for what no run has written."""
        counts = ("tokens", "samples", "skipped", "without_better")
        elapsed, losses = saved.get("elapsed", 0.0), saved.get("losses", [])
        right = {
            **{name: type(value := saved.get(name, 0)) is int and 0 <= value < LARGEST for name in counts},
            **{name: saved.get(name) is None or _is_number(saved[name]) for name in ("best_loss", "best_step")},
            "elapsed": _is_number(elapsed) and elapsed >= 0,
            "owes_validation": isinstance(saved.get("owes_validation", False), bool),
            "losses": isinstance(losses, list) and all(map(_is_number, losses)),
        }
        wrong = sorted(name for name in {*saved, *right} if not right.get(name))
        if wrong:
            raise RunError(f"the checkpoint's counters cannot be right: {', '.join(wrong)}.")
        return cls(**saved)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < LARGEST
