"""Options of the mlx-lm adapter format, apart from its code so that the verbs can name them without loading it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlxlora.errors import ConfigError


@dataclass(frozen=True)
class MlxLmOptions:
    """Options of `mlxlora import --format mlx-lm`."""

    scale: float | None = None
    """what the product of A and B was multiplied with while training, for files that do not say so"""

    def __post_init__(self) -> None:
        if self.scale is not None and not (math.isfinite(self.scale) and 0 < abs(self.scale) <= 1e4):
            raise ConfigError(f"--mlx_lm.scale must be a number within ±10000 and not 0, not {self.scale!r}.")
