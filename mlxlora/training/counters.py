"""What the training loop remembers: steps on their way to the device, and what a run counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx


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
