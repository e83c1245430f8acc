"""Options of `--to hf`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlxlora.errors import ConfigError


@dataclass(frozen=True)
class HuggingFaceOptions:
    """Options of `--to hf`."""

    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """of the weights (default: as they are; where they are packed, as their scales are)"""

    def __post_init__(self) -> None:
        if self.dtype not in (None, "float32", "float16", "bfloat16"):
            raise ConfigError(f"--hf.dtype must be float32, float16 or bfloat16, not {self.dtype!r}.")
