"""A small batch on which two ways of computing a step are compared before one is trusted."""

from __future__ import annotations

import math

import mlx.core as mx

from mlxlora.data.sample import Batch
from mlxlora.engine.anatomy import Anatomy, relative_error
from mlxlora.engine.scores import Outcome, Scores
from mlxlora.parameters import number

Step = tuple[Outcome, dict[str, mx.array]]


def small_batch(anatomy: Anatomy) -> Batch:
    """Two rows of eight tokens, four of them scored."""
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]]) % anatomy.vocabulary
    places = mx.array([2, 3, 6, 12])
    return Batch(tokens, places, tokens.flatten()[places + 1], mx.ones(4))


def likelihood(scores: Scores, batch: Batch) -> Outcome:
    """An objective: the negative log-likelihood of the scored tokens."""
    return -scores.token_log_probs(batch).sum(), batch.weights.sum(), {}


def disagreement(found: Step, expected: Step) -> float:
    """The largest relative difference of the sums and of any gradient (against at least 1 % of the largest of all)."""
    largest = max((_largest(grad) for grad in expected[1].values()), default=0.0)
    errors = [relative_error(found[0][0], expected[0][0])]
    for path, grad in expected[1].items():
        errors.append(_largest(found[1][path] - grad) / max(_largest(grad), 1e-2 * largest, 1e-30))
    return max(math.inf if math.isnan(error) else error for error in errors)


def _largest(array: mx.array) -> float:
    return number(mx.max(mx.abs(array.astype(mx.float32))))
