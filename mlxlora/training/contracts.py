"""What the training loop asks of those passed in: batches, an engine, an objective, a place for checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from mlxlora.data.sample import Batch
from mlxlora.engine.scores import Metrics, Objective, Outcome
from mlxlora.training.checkpoint import TrainingState


class Batches(Protocol):
    """What the loop asks of the data. `plan` must be a pure function of the epoch."""

    @property
    def samples(self) -> int:
        """How many samples an epoch has."""
        ...

    def plan(self, epoch: int) -> Sequence[Any]:
        """The micro-batches of an epoch, in order; `batch`, `tokens` and `origins` take one of them."""
        ...

    def batch(self, planned: Any) -> Batch:
        """The arrays of a micro-batch."""
        ...

    def tokens(self, planned: Any) -> tuple[int, int]:
        """(trained, processed) tokens, padding left out."""
        ...

    def origins(self, planned: Any) -> list[str]:
        """Where its samples come from, `file:line` each."""
        ...


class TrainingEngine(Protocol):
    """What the loop asks of the engine."""

    def value_and_grad(
        self, objective: Objective, batch: Batch, key: mx.array | None = None
    ) -> tuple[mx.array, mx.array, Metrics, Any]:
        """(sum, count, metrics, gradients of the sum); `key` makes the dropout masks."""
        ...

    def evaluate(self, objective: Objective, batch: Batch) -> Outcome:
        """(sum, count, metrics) without dropout."""
        ...


class Store(Protocol):
    """Where checkpoints go."""

    def save(self, state: TrainingState, *, adapter_writer: Callable[[Path], None], best: bool, keep: int) -> Path:
        """Publish a checkpoint and the adapter; `best` also as the best one. The newest `keep` checkpoints stay."""
        ...
