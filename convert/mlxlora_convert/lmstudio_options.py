"""Options of `--to lmstudio`, in a module without heavy imports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlxlora.errors import ConfigError
from mlxlora_convert.gguf_options import GGUFType, check_type


@dataclass(frozen=True, slots=True)
class LMStudioOptions:
    """Options of a model for LM Studio.

    Attributes:
        form: mlx: a model directory for its MLX engine; gguf: a file for its llama.cpp engine
        type: the number format of the GGUF file
    """

    form: Literal["mlx", "gguf"] = "mlx"
    type: GGUFType = "q8_0"

    def __post_init__(self) -> None:
        check_type(self.type)
        if self.form not in ("mlx", "gguf"):
            raise ConfigError(f"lmstudio.form must be mlx or gguf, not '{self.form}'.")
