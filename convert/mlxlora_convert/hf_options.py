"""Options of `--to hf`."""

from __future__ import annotations

from dataclasses import dataclass

from mlxlora.dtypes import DTYPES, Dtype
from mlxlora.errors import ConfigError


@dataclass(frozen=True)
class HuggingFaceOptions:
    """Options of `--to hf`."""

    dtype: Dtype | None = None
    """of the weights (default: as they are; where they are packed, as their scales are)"""

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise ConfigError(f"--hf.dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
