"""safetensors files: written in one order and hashed by anyone, read only after the header has been checked.

The layout: 8 bytes little-endian length of the header, the header (a JSON object: name → dtype, shape, data_offsets;
`__metadata__`: strings), the data without holes. MLX trusts the header, so everything in it is checked here first.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlora.errors import FormatError, InputError, Problem
from mlxlora.files.reading import parse_json

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
MAX_DIMENSION = 2**31 - 1  # MLX counts dimensions in 32 bits
MAX_AXES = 32

# The dtypes that MLX loads: tag → bytes of one element. FP8 arrives as uint8.
DTYPES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "C64": 8,
}  # fmt: skip
TAGS = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16", mx.float16: "F16",
    mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32", mx.float32: "F32", mx.uint64: "U64", mx.int64: "I64",
    mx.complex64: "C64",
}  # fmt: skip


def check_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Check the header of a safetensors file against the file, and return name → (dtype tag, shape).

    Reads the header alone. Call it before `mx.load`, which trusts what stands there (`load_safetensors` does both).
    Raises InputError when there is no such file, FormatError naming tensor, expected and found for: a header that is
    no JSON object or too long, a name that occurs twice, an unknown dtype, a shape that is negative or overflows,
    offsets that disagree with the shape, overlap, leave holes or point outside of the file, and a truncated file.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header, start = _read_header(path, file.read(8), size, file.read)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a directory, not a file.") from None
    problems: list[Problem] = []
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            if entry is not None and not (isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values())):
                problems.append(Problem(name, "expected an object of strings"))
            continue
        wrong = _wrong_entry(entry)
        if wrong:
            problems.append(Problem(name, wrong))
            continue
        found[name] = (entry["dtype"], tuple(entry["shape"]))
        spans.append((*entry["data_offsets"], name))
    if not problems:
        problems = _wrong_layout(sorted(spans), size - start)
    if problems:
        raise FormatError.of(f"{path} is not a sound safetensors file:", problems)
    return found


def _read_header(path: Path, prefix: bytes, size: int, read: Any) -> tuple[dict[str, Any], int]:
    if len(prefix) < 8:
        raise FormatError(f"{path} is not a safetensors file: expected at least 8 bytes, found {size}.")
    length = struct.unpack("<Q", prefix)[0]
    if length > min(MAX_HEADER, size - 8):
        raise FormatError(
            f"{path} is not a safetensors file, or it is truncated: its header should take {length} bytes,"
            f" the file has {size}."
        )
    header = parse_json(read(length), path, what="safetensors header", unique=True, error=FormatError)
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the safetensors header is not a JSON object.")
    return header, 8 + length


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def _wrong_entry(entry: Any) -> str:
    """What is wrong with one tensor's entry by itself, or an empty string."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "expected an object of dtype, shape and data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"dtype {dtype!r} is not one that MLX loads ({', '.join(DTYPES)})"
    if not _whole_numbers(shape) or len(shape) > MAX_AXES or any(not 0 <= n <= MAX_DIMENSION for n in shape):
        return f"shape {str(shape)[:80]} is not a list of at most {MAX_AXES} numbers from 0 to {MAX_DIMENSION}"
    if not _whole_numbers(offsets) or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        return f"data_offsets {str(offsets)[:80]} are not a begin and an end"
    expected = math.prod(shape) * DTYPES[dtype]
    if offsets[1] - offsets[0] != expected:
        return f"{dtype} {shape} takes {expected} bytes, its data_offsets {offsets} hold {offsets[1] - offsets[0]}"
    return ""


def _wrong_layout(spans: list[tuple[int, int, str]], size: int) -> list[Problem]:
    """Where the data overlap, leave a hole, or end before or after the file does."""
    problems = []
    end = 0
    for begin, stop, name in spans:
        if begin < end:
            problems.append(
                Problem(name, f"begins at byte {begin}, inside of the tensor before it, which ends at {end}")
            )
        elif begin > end:
            problems.append(Problem(name, f"begins at byte {begin}, expected {end}: there is a hole before it"))
        if stop > size:
            problems.append(Problem(name, f"ends at byte {stop}, but the file holds {size} bytes of data: truncated?"))
        end = max(end, stop)
    if not problems and end != size:
        problems.append(Problem("data", f"the tensors take {end} bytes, but the file holds {size}"))
    return problems


def load_safetensors(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file by name, lazily, after `check_safetensors` has passed its header."""
    expected = check_safetensors(path)
    tensors = mx.load(str(path), format="safetensors")
    assert isinstance(tensors, dict)
    different = [
        Problem(name, f"expected shape {list(shape)}, MLX reads {list(tensors[name].shape)}")
        for name, (_, shape) in expected.items()
        if name not in tensors or tuple(tensors[name].shape) != shape
    ]
    if different:
        raise FormatError.of(f"{path} changed while it was read:", different)
    return tensors


def save_safetensors(path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors so that equal tensors give equal bytes, whatever the order of the mapping.

    Sorted by element size (widest first, so that each is aligned), then by name. To be called inside `new_directory`:
    the file is written in place, and an error leaves a part of it.
    """
    path = Path(path)
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.size, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in TAGS:
            raise TypeError(f"{name}: {tensor.dtype} has no place in a safetensors file")
        header[name] = {
            "dtype": TAGS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            if tensors[name].size:
                file.write(_raw(tensors[name]))


def _raw(tensor: mx.array) -> memoryview:
    """The bytes of a tensor, row by row; no copy when it is contiguous."""
    # numpy has no bfloat16: look at the bytes as integers of the same width
    plain = tensor.view(mx.uint16) if tensor.dtype == mx.bfloat16 else tensor
    return np.ascontiguousarray(np.asarray(plain)).reshape(-1).view(np.uint8).data
