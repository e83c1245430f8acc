"""The tensors of a GGUF file, read a few rows at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlxlora.errors import FormatError, Problem, UnsupportedError
from mlxlora_convert.gguf_header import GGUFHeader, TensorInfo
from mlxlora_convert.gguf_tensors import BLOCK, CODED, decode_blocks
from mlxlora_convert.safetensors_rows import Floats
from mlxlora_convert.weight_rows import Blocks, Weight


class GGUFWeight(Weight):
    """One tensor of a GGUF file."""

    def __init__(self, path: Path, info: TensorInfo) -> None:
        from gguf.constants import GGMLQuantizationType

        self.path, self.info, self.shape = path, info, info.shape
        self.kind = GGMLQuantizationType(info.type)

    @property
    def type(self) -> str:
        """Its number format, in lower case."""
        return str(self.kind.name).lower()

    def raw(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes of rows `start:stop`: [stop - start, bytes per row]."""
        width = self.info.nbytes // math.prod(self.shape[:-1])
        with self.path.open("rb") as file:
            file.seek(self.info.offset + start * width)
            data = file.read((stop - start) * width)
        if len(data) != (stop - start) * width:
            raise FormatError(f"{self.path}: {self.info.name} ends too early; the file changed while it was read.")
        return np.frombuffer(data, dtype=np.uint8).reshape(stop - start, width)

    def floats(self, start: int, stop: int) -> Floats:
        from gguf.quants import dequantize

        if self.type in ("i8", "i16", "i32", "i64", "f64"):
            what = Problem(self.info.name, f"stored as {self.type}, expected floating-point or quantized numbers")
            raise FormatError.of(f"{self.path}: not a weight", [what])
        try:
            values = dequantize(self.raw(start, stop), self.kind)
        except NotImplementedError:
            raise UnsupportedError(
                f"{self.path}: {self.info.name} is {self.type}, which cannot be dequantized yet."
            ) from None
        return np.asarray(values, dtype=np.float32).reshape(stop - start, self.shape[-1])

    def blocks(self, start: int, stop: int) -> Blocks | None:
        if (self.type not in CODED and self.type != "mxfp4") or self.shape[-1] % BLOCK:
            return None
        return decode_blocks(self.raw(start, stop), self.type, self.shape[-1])


def float_tensor(header: GGUFHeader, name: str) -> Floats:
    """A small tensor of a GGUF file, whole, as float32 in its own shape."""
    weight = GGUFWeight(header.path, header.tensors[name])
    return weight.floats(0, weight.rows).reshape(weight.shape)
