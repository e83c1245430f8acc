"""The loss on a whole set of batches, without learning from it."""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx

from mlxlora.engine.scores import Objective
from mlxlora.parameters import number
from mlxlora.training.contracts import Batches, TrainingEngine


def evaluate(
    engine: TrainingEngine, objective: Objective, batches: Batches, stop: Callable[[], bool] = lambda: False
) -> tuple[float, int] | None:
    """Mean loss over all batches of epoch 0, and the number of trained tokens in them; None when `stop` says so."""
    total, weight, tokens = 0.0, 0.0, 0
    for planned in batches.plan(0):
        if stop():
            return None
        value, count, _ = engine.evaluate(objective, batches.batch(planned))
        mx.eval(value, count)
        total += number(value)
        weight += number(count)
        tokens += batches.tokens(planned)[0]
    return total / weight if weight else math.nan, tokens
