"""What a model is trained for: one pure function each, `(scores, batch) -> (sum, count, metrics)`."""

from mlxlora.objectives.sft import sft

__all__ = ["sft"]
