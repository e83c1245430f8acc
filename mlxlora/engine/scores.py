"""What an objective sees of the model, and what an objective is."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from mlxlora.data.sample import Batch

Metrics = dict[str, mx.array]
Outcome = tuple[mx.array, mx.array, Metrics]


class Scores(Protocol):
    """The model's answer to a batch."""

    def token_log_probs(self, batch: Batch) -> mx.array:
        """Log-probability of each of `batch.targets` at `batch.loss_positions`: float32 [P], differentiable."""
        ...


class Objective(Protocol):
    """What is made small: `(sum, count, metrics)`, with the sum to divide by the count of the whole optimizer step.

    Pure: it reads the arrays of `scores` and `batch`, calls MLX operations, and looks at no value.
    """

    def __call__(self, scores: Scores, batch: Batch) -> Outcome: ...
