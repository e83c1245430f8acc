"""The step: value and gradient of an objective, fast and in little memory, for mlx-lm's models as they are."""

from mlxlora.engine.config import EngineConfig
from mlxlora.engine.engine import Engine
from mlxlora.engine.packing import packing_refusal
from mlxlora.engine.scores import Metrics, Objective, Outcome, Scores

__all__ = ["Engine", "EngineConfig", "Metrics", "Objective", "Outcome", "Scores", "packing_refusal"]
