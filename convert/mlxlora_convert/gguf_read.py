"""The tensors of a GGUF file, read a few rows at a time."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlxlora.errors import FormatError, UnsupportedError
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

        values = dequantize(self.raw(start, stop), self.kind)
        return np.asarray(values, dtype=np.float32).reshape(stop - start, self.shape[-1])

    def blocks(self, start: int, stop: int) -> Blocks | None:
        if (self.type not in CODED and self.type != "mxfp4") or self.shape[-1] % BLOCK:
            return None
        return decode_blocks(self.raw(start, stop), self.type, self.shape[-1])


def refuse_unreadable(header: GGUFHeader) -> None:
    """Raise UnsupportedError where tensors are in number formats that `gguf` cannot turn into floats."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    found: dict[str, list[str]] = {}
    for name, info in header.tensors.items():
        kind = GGMLQuantizationType(info.type)
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)  # one block
        except NotImplementedError:
            found.setdefault(kind.name.lower(), []).append(name)
    if found:
        said = "; ".join(f"{kind} ({len(names)} tensors, such as {names[0]})" for kind, names in found.items())
        raise UnsupportedError(
            f"{header.path} holds number formats that are not read: {said}. Take a file of another type, such as q8_0."
        )


def float_tensor(header: GGUFHeader, name: str) -> Floats:
    """A small tensor of a GGUF file, whole, as float32 in its own shape."""
    weight = GGUFWeight(header.path, header.tensors[name])
    return weight.floats(0, weight.rows).reshape(weight.shape)
