"""Supervised fine-tuning: make the tokens of the sample likely."""

from __future__ import annotations

from mlxlora.data.sample import Batch
from mlxlora.engine.scores import Outcome, Scores


def sft(scores: Scores, batch: Batch) -> Outcome:
    """Weighted negative log-likelihood: sum = −Σ wₚ log p(targetₚ), count = Σ wₚ.

    sum / count is the loss in nats per token; its exponential is the perplexity.
    """
    log_probs = scores.token_log_probs(batch)
    # a padded position has weight 0; its log-probability is a number all the same
    return -(batch.weights * log_probs).sum(), batch.weights.sum(), {}
