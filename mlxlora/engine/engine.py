"""The engine: value and gradient of an objective for one batch, as fast and as small as the model allows."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlxlora.data.sample import Batch
from mlxlora.engine.anatomy import dissect
from mlxlora.engine.config import EngineConfig
from mlxlora.engine.general import General
from mlxlora.engine.scores import Metrics, Objective


class Engine:
    """Computes steps for one network.

    The network is one of mlx-lm's, with or without adapters in it; it stays as it is. What is trainable is looked up once,
    here: make an engine after adapters were put in or taken out.

        engine = Engine(network)
        total, count, metrics, grads = engine.value_and_grad(sft, batch)

    Attributes:
        notes: what had to be computed in a slower or larger way for this model, and why
    """

    def __init__(self, network: nn.Module, config: EngineConfig | None = None) -> None:
        self.network = network
        self.config = config or EngineConfig()
        self.notes: list[str] = []
        self._anatomy = dissect(network, self.notes)
        self._general = General(
            self._anatomy,
            self.config.loss_chunk,
            recompute=self.config.checkpoint_blocks != "none",
            compiled=self.config.compile,
        )

    def value_and_grad(
        self, objective: Objective, batch: Batch, key: mx.array | None = None
    ) -> tuple[mx.array, mx.array, Metrics, Any]:
        """`(sum, count, metrics, gradients of the sum)` of `objective` for `batch`.

        The gradients form a tree like `network.trainable_parameters()`. `key` is the randomness of dropout; without one
        there is no dropout. Nothing is waited for: the arrays may still be on their way.
        """
        (total, count, metrics), slopes = self._general.run(objective, batch, key, gradients=True)
        slots = self._general.slots
        by_path = {slots.paths[index]: slope for index, slope in zip(slots.trainable, slopes, strict=True)}
        return total, count, metrics, self._tree(by_path)

    def evaluate(self, objective: Objective, batch: Batch) -> tuple[mx.array, mx.array, Metrics]:
        """`(sum, count, metrics)` of `objective` for `batch`, without gradients and without dropout."""
        outcome, _ = self._general.run(objective, batch, None, gradients=False)
        return outcome

    def close(self) -> None:
        """Let go of the network and of all that was compiled for it."""
        self._general.close()

    def _tree(self, by_path: dict[str, mx.array]) -> Any:
        order = [path for path, _ in tree_flatten(self.network.trainable_parameters())]
        return tree_unflatten([(path, by_path[path]) for path in order])
