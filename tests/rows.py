"""Samples in a fixed order as the training loop wants them, and runs of the real loop over the real engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxlora.data.sample import Batch, Sample
from mlxlora.engine.config import EngineConfig
from mlxlora.engine.engine import Engine
from mlxlora.objectives.sft import sft
from mlxlora.training.config import TrainingConfig
from mlxlora.training.events import Step
from mlxlora.training.loop import Trainer
from mlxlora.training.optimizer import Optimizer, OptimizerConfig
from tests import reference


@dataclass(frozen=True)
class Rows:
    """`size` samples a micro-batch, in the order given, the same each epoch."""

    made: Sequence[Sample]
    size: int

    @property
    def samples(self) -> int:
        return len(self.made)

    def plan(self, epoch: int) -> list[tuple[int, ...]]:
        places = range(len(self.made))
        return [tuple(places[start : start + self.size]) for start in range(0, len(self.made), self.size)]

    def batch(self, planned: tuple[int, ...]) -> Batch:
        return reference.padded([self.made[place] for place in planned], pad_positions=5, first=planned[0])

    def tokens(self, planned: tuple[int, ...]) -> tuple[int, int]:
        rows = [self.made[place] for place in planned]
        return sum(int((row.weights > 0).sum()) for row in rows), sum(len(row.tokens) for row in rows)

    def origins(self, planned: tuple[int, ...]) -> list[str]:
        return [f"rows:{place + 1}" for place in planned]


def train(
    network: nn.Module,
    rows: Rows,
    optimizer: OptimizerConfig,
    *,
    engine: EngineConfig | None = None,
    **training: Any,
) -> tuple[list[float], dict[str, mx.array]]:
    """Run the training loop; returns the loss of every step and the final trainable parameters."""
    config = TrainingConfig(**training)
    made = Engine(network, engine or EngineConfig(compile="never"))
    steps = config.steps or 1
    trainer = Trainer(
        network=network, engine=made, objective=sft, batches=rows, optimizer=Optimizer(optimizer, steps), config=config
    )
    losses = [event.loss for event in trainer if isinstance(event, Step)]
    made.close()
    return losses, trainer.parameters
