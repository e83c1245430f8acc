"""The header of a GGUF file, read with suspicion.

A GGUF file is a header (metadata, then one entry per tensor) followed by the tensors' bytes. Readers map the file and
trust the header; this one trusts nothing: every length is held against the file's size before a byte is allocated, and
the tensors must lie inside the file, aligned and apart. Whoever maps the file afterwards meets no surprise.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mlxlora.errors import FormatError, Problem

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_NAME = 65_535
MAX_NESTING = 4
STRING, ARRAY = 8, 9
# the scalar types of metadata, by their number in the file
SCALARS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "|b1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and what it is.

    `shape` has the outermost dimension first (the file stores it the other way round); `type` is ggml's number;
    `offset` counts from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What a GGUF file says about itself: metadata by key, tensors by name, all of it checked."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @property
    def architecture(self) -> str:
        """`general.architecture`, or an empty string."""
        name = self.metadata.get("general.architecture", "")
        return name if isinstance(name, str) else ""


def read_header(path: Path | str) -> GGUFHeader:
    """Read and check the header of a GGUF file without mapping or loading the tensors.

    Raises FormatError that names the field or the tensor, what was expected and what was found.
    """
    path = Path(path)
    if not path.is_file():
        raise FormatError(f"{path} is not a file." if path.exists() else f"{path} does not exist.")
    with path.open("rb") as file:
        cursor = Cursor(path, file, os.fstat(file.fileno()).st_size)
        if (magic := cursor.take(4, "the magic number")) != MAGIC:
            hint = " It looks like a big-endian GGUF file." if magic == MAGIC[::-1] else ""
            raise FormatError(f"{path} is no GGUF file: it begins with {magic!r}, expected {MAGIC!r}.{hint}")
        version = cursor.number("I", "the version")
        if version not in VERSIONS:
            swapped = " (big-endian files cannot be read)" if version & 0xFFFF == 0 else ""
            raise cursor.wrong("version", f"found {version}, expected 2 or 3{swapped}")
        tensor_count = cursor.count(24, "the number of tensors")
        key_count = cursor.count(12, "the number of metadata keys")
        metadata = read_metadata(cursor, key_count)
        entries = [read_entry(cursor) for _ in range(tensor_count)]
        alignment = check_alignment(cursor, metadata)
        start = -(-cursor.offset // alignment) * alignment
        tensors = place(path, entries, start, alignment, cursor.size)
    if metadata.get("split.count", 1) not in (0, 1):
        advice = "Join the parts first (llama-gguf-split --merge)"
        raise FormatError.of(
            f"{path}: one part of several", [Problem("split.count", str(metadata["split.count"]), advice)]
        )
    return GGUFHeader(path, version, metadata, tensors)


class Cursor:
    """Reads a file forwards and never past its end, nor more than is there."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.file, self.size, self.offset = path, file, size, 0

    def wrong(self, where: str, what: str) -> FormatError:
        """A FormatError of this file at the present byte."""
        return FormatError.of(f"{self.path}: malformed GGUF header at byte {self.offset}", [Problem(where, what)])

    def take(self, length: int, what: str) -> bytes:
        """The next `length` bytes."""
        left = self.size - self.offset
        if length > left:
            raise self.wrong(what, f"needs {length} bytes, the file has {left} left; it is truncated or malformed")
        data = self.file.read(length)
        if len(data) != length:
            raise self.wrong(what, f"needs {length} bytes, {len(data)} could be read; the file changed or is truncated")
        self.offset += length
        return data

    def number(self, form: str, what: str) -> int:
        """One little-endian number (`I`: 32 bits, `Q`: 64 bits)."""
        (value,) = struct.unpack("<" + form, self.take(struct.calcsize(form), what))
        return int(value)

    def count(self, least: int, what: str) -> int:
        """A number of things of at least `least` bytes each: no more than the rest of the file can hold."""
        value = self.number("Q", what)
        if value * least > self.size - self.offset:
            raise self.wrong(what, f"{value} things of at least {least} bytes do not fit into the rest of the file")
        return value

    def text(self, what: str, longest: int | None = None) -> str:
        """One string: its length, then UTF-8."""
        length = self.count(1, f"the length of {what}")
        if longest is not None and not 0 < length <= longest:
            raise self.wrong(what, f"{length} bytes long, expected 1 to {longest}")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(what, f"not UTF-8 ({error.reason})") from None


def read_metadata(cursor: Cursor, count: int) -> dict[str, Any]:
    """The key-value pairs. Arrays of numbers come as NumPy arrays, arrays of strings as lists."""
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text("a metadata key", MAX_NAME)
        if key in metadata:
            raise cursor.wrong(key, "stands in the metadata twice")
        metadata[key] = read_value(cursor, cursor.number("I", f"the type of {key}"), key)
    return metadata


def read_value(cursor: Cursor, kind: int, key: str, depth: int = 0) -> Any:
    """One metadata value of the given type."""
    if kind == STRING:
        return cursor.text(key)
    if kind == ARRAY:
        if depth >= MAX_NESTING:
            raise cursor.wrong(key, f"arrays nested more than {MAX_NESTING} deep")
        inner = cursor.number("I", f"the element type of {key}")
        if inner in SCALARS:
            return read_numbers(cursor, SCALARS[inner], cursor.count(np.dtype(SCALARS[inner]).itemsize, key), key)
        count = cursor.count(8 if inner == STRING else 12, key)
        return [read_value(cursor, inner, key, depth + 1) for _ in range(count)]
    if kind not in SCALARS:
        raise cursor.wrong(key, f"unknown metadata type {kind}")
    return read_numbers(cursor, SCALARS[kind], 1, key)[0].item()


def read_numbers(cursor: Cursor, dtype: str, count: int, key: str) -> NDArray[Any]:
    """`count` numbers; booleans must be 0 or 1."""
    data = cursor.take(np.dtype(dtype).itemsize * count, key)
    if dtype == "|b1" and any(byte > 1 for byte in data):
        raise cursor.wrong(key, "a boolean that is neither 0 nor 1")
    return np.frombuffer(data, dtype=dtype)


def read_entry(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor entry: name, shape (outermost first), type, offset into the data."""
    name = cursor.text("a tensor's name", MAX_NAME)
    dimensions = cursor.number("I", f"the number of dimensions of {name}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.wrong(name, f"{dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(cursor.number("Q", f"the shape of {name}") for _ in range(dimensions))[::-1]
    if min(shape) < 1 or math.prod(shape) >= 2**63:
        raise cursor.wrong(name, f"impossible shape {list(shape)}")
    return name, shape, cursor.number("I", f"the type of {name}"), cursor.number("Q", f"the offset of {name}")


def check_alignment(cursor: Cursor, metadata: dict[str, Any]) -> int:
    """`general.alignment`: a power of two, 32 when it is not given."""
    value = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 2**20 or value & (value - 1):
        raise cursor.wrong("general.alignment", f"found {value!r}, expected a power of two")
    return value


def tensor_bytes(name: str, shape: tuple[int, ...], kind: int) -> int | Problem:
    """The bytes of a tensor of ggml type `kind`, or what is wrong with it."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        return Problem(name, f"unknown tensor type {kind}")
    if shape[-1] % block:
        label = GGMLQuantizationType(kind).name
        return Problem(name, f"rows of {shape[-1]} values, expected a multiple of {block} for type {label}")
    return math.prod(shape) // int(block) * int(size)


def place(
    path: Path, entries: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int
) -> dict[str, TensorInfo]:
    """Hold every tensor against the file: known type, aligned, inside, apart from the others. All problems at once."""
    problems: list[Problem] = []
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind, offset in entries:
        nbytes = tensor_bytes(name, shape, kind)
        if isinstance(nbytes, Problem):
            problems.append(nbytes)
        elif name in tensors:
            problems.append(Problem(name, "stands in the file twice"))
        elif offset % alignment:
            problems.append(Problem(name, f"offset {offset}, expected a multiple of {alignment}"))
        elif start + offset + nbytes > size:
            found = f"bytes {start + offset} to {start + offset + nbytes}, but the file ends at {size}"
            problems.append(Problem(name, found, "It is truncated: fetch or export it again"))
        else:
            tensors[name] = TensorInfo(name, shape, kind, start + offset, nbytes)
    in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(in_order):
        if before.offset + before.nbytes > after.offset:
            problems.append(Problem(after.name, f"overlaps {before.name}"))
    if problems:
        raise FormatError.of(f"{path}: malformed GGUF header", problems)
    return tensors
