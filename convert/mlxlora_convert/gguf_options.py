"""Options of `--to gguf`, in a module without heavy imports, so that the command line is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mlxlora.dtypes import Dtype
from mlxlora.errors import ConfigError, nearest

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4"]
TYPES: tuple[str, ...] = get_args(GGUFType)


@dataclass(frozen=True, slots=True)
class GGUFOptions:
    """Options of a GGUF file.

    Attributes:
        type: the number format of the weights; vectors and routers stay float32
    """

    type: GGUFType = "f16"

    def __post_init__(self) -> None:
        check_type(self.type)


@dataclass(frozen=True, slots=True)
class GGUFImportOptions:
    """Options of a model that is read from GGUF.

    Attributes:
        dtype: number format of what is not quantized (default: what most of the file is in, float16 for quantized
            files)
        dequantize: make numbers of the quantized tensors too, instead of keeping them where MLX has the same
    """

    dtype: Dtype | None = None
    dequantize: bool = False


def check_type(kind: str) -> None:
    """Raise ConfigError for a type that cannot be written."""
    if kind not in TYPES:
        raise ConfigError(f"gguf.type is '{kind}'.{nearest(kind, TYPES)} It can be one of {', '.join(TYPES)}.")
