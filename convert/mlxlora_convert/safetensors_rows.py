"""safetensors files, read a few rows at a time, their headers checked first."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxlora.errors import FormatError, Problem
from mlxlora.files import check_safetensors

Floats = NDArray[np.float32]
# how NumPy reads each type (bfloat16 as its 16 bits)
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2",
    "U32": "<u4", "I32": "<i4", "U64": "<u8", "I64": "<i8", "BOOL": "|b1",
}  # fmt: skip
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in a safetensors file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def row_shape(self) -> tuple[int, int]:
        """(rows, values per row); a vector is one row."""
        return math.prod(self.shape[:-1]), self.shape[-1]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows `start:stop` as stored: [stop - start, values per row]."""
        kind = np.dtype(DTYPES[self.dtype])
        width = self.row_shape[1]
        with self.path.open("rb") as file:
            file.seek(self.offset + start * width * kind.itemsize)
            data = file.read((stop - start) * width * kind.itemsize)
        if len(data) != (stop - start) * width * kind.itemsize:
            raise FormatError(f"{self.path}: {self.name} ends too early; the file changed while it was read.")
        return np.frombuffer(data, dtype=kind).reshape(stop - start, width)

    def read_floats(self, start: int, stop: int) -> Floats:
        """Rows `start:stop` as float32."""
        raw = self.read(start, stop)
        if self.dtype == "BF16":
            return (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, after its header was checked.

    Raises FormatError for a header that does not fit the file, or for types that have no numbers here.
    """
    kinds = check_safetensors(path)
    strange = [Problem(name, f"stored as {kind}") for name, (kind, _) in kinds.items() if kind not in DTYPES]
    if strange:
        raise FormatError.of(f"{path}: tensors of unknown types", strange)
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    start = 8 + length
    return {
        name: StoredTensor(path, name, kind, shape or (1,), start + header[name]["data_offsets"][0])
        for name, (kind, shape) in kinds.items()
    }
