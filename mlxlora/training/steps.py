"""How many updates a run comes to, counted before the first: for a learning rate's schedule and for the planner."""

from __future__ import annotations

import math

from mlxlora.training.config import TrainingConfig
from mlxlora.training.contracts import Batches


def count_steps(batches: Batches, config: TrainingConfig) -> int:
    """How many updates `config` asks for."""
    if config.steps is not None:
        return config.steps
    epochs = config.epochs if config.epochs is not None else 2.0
    whole = int(epochs)
    steps = sum(steps_in(batches, config, epoch) for epoch in range(whole))
    if epochs > whole:
        steps += math.ceil((epochs - whole) * steps_in(batches, config, whole))
    return max(steps, 1)


def steps_in(batches: Batches, config: TrainingConfig, epoch: int) -> int:
    """How many updates one epoch comes to; the last may see fewer micro-batches."""
    return math.ceil(len(batches.plan(epoch)) / config.accumulate)


def count_validations(batches: Batches, config: TrainingConfig, steps: int) -> int:
    """How often a run of `steps` updates validates, the look before its first step included."""
    return 1 + math.ceil(steps / (config.validate_every or steps_in(batches, config, 0)))


def epochs_of(batches: Batches, config: TrainingConfig, steps: int) -> float:
    """How many epochs so many updates come to."""
    done, epoch = 0, 0
    while True:
        here = steps_in(batches, config, epoch)
        if done + here >= steps:
            return epoch + (steps - done) / here
        done, epoch = done + here, epoch + 1
