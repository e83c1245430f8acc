"""The weights of an MLX model directory, read a few rows at a time.

A model is larger than memory may be, so nothing here loads a tensor whole. Every weight is a `Weight`: a shape and a
way to read rows `start:stop` as float32 (all dimensions but the last are rows). Transformations (a row permutation, a
factor, stacking) are Weights around Weights, so that they too happen a few rows at a time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlxlora.errors import FormatError, ModelError, Problem
from mlxlora.weights import weight_files
from mlxlora_convert.safetensors_rows import FLOATING, Floats, StoredTensor, stored_tensors


class Weight(ABC):
    """A tensor that is read a few rows at a time."""

    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows there are: the product of all dimensions but the last."""
        return math.prod(self.shape[:-1])

    @abstractmethod
    def floats(self, start: int, stop: int) -> Floats:
        """Rows `start:stop` as float32 [stop - start, shape[-1]]."""

    def blocks(self, start: int, stop: int) -> Blocks | None:
        """Rows `start:stop` in the quantized form they are stored in, if any with blocks of a multiple of 32."""
        return None


@dataclass(frozen=True, slots=True)
class Blocks:
    """Quantized rows: integer codes, and a scale and a bias for every block of 32 values.

    mode affine: value = scale · code + bias. mode mxfp4: `codes` are E2M1 codes, `scales` E8M0 bytes, no biases.
    """

    mode: str
    bits: int
    codes: NDArray[np.uint8]  # [rows, values]
    scales: NDArray[Any]  # [rows, values / 32]
    biases: Floats | None


class PlainWeight(Weight):
    """A tensor stored as numbers."""

    def __init__(self, stored: StoredTensor) -> None:
        if stored.dtype not in FLOATING:
            raise FormatError.of(
                f"{stored.path}: not a floating-point tensor", [Problem(stored.name, f"stored as {stored.dtype}")]
            )
        self.stored, self.shape = stored, stored.shape

    def floats(self, start: int, stop: int) -> Floats:
        return self.stored.read_floats(start, stop)


class QuantizedWeight(Weight):
    """A tensor that MLX stores quantized: packed codes, scales, and biases in affine mode."""

    def __init__(
        self,
        codes: StoredTensor,
        scales: StoredTensor,
        biases: StoredTensor | None,
        *,
        bits: int,
        group: int,
        mode: str,
    ) -> None:
        self.codes, self.scales, self.biases = codes, scales, biases
        self.bits, self.group, self.mode = bits, group, mode
        width = codes.shape[-1] * 32 // bits
        if codes.dtype != "U32" or codes.shape[-1] * 32 % bits or scales.shape != (*codes.shape[:-1], width // group):
            found = f"codes {codes.dtype} {list(codes.shape)} with scales {list(scales.shape)}"
            raise FormatError.of(
                f"{codes.path}: quantization does not fit",
                [Problem(codes.name, f"{found}, {bits} bits, group {group}")],
            )
        self.shape = (*codes.shape[:-1], width)

    def floats(self, start: int, stop: int) -> Floats:
        affine = self.mode == "affine"
        scales = self.scales.read_floats(start, stop) if affine else self.scales.read(start, stop)
        biases = mx.array(self.biases.read_floats(start, stop)) if affine and self.biases else None
        plain = mx.dequantize(
            mx.array(self.codes.read(start, stop)),
            mx.array(scales),
            biases,
            group_size=self.group,
            bits=self.bits,
            mode=self.mode,
        )
        return np.array(plain.astype(mx.float32))

    def blocks(self, start: int, stop: int) -> Blocks | None:
        if self.mode not in ("affine", "mxfp4") or self.group % 32:
            return None
        repeat = self.group // 32
        codes = unpack(self.codes.read(start, stop), self.bits)
        if self.mode == "mxfp4":
            return Blocks("mxfp4", 4, codes, np.repeat(self.scales.read(start, stop), repeat, axis=1), None)
        if self.biases is None:
            return None
        scales = np.repeat(self.scales.read_floats(start, stop), repeat, axis=1)
        return Blocks(
            "affine", self.bits, codes, scales, np.repeat(self.biases.read_floats(start, stop), repeat, axis=1)
        )


def unpack(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """The codes of `bits` bits in packed 32-bit words (lowest bits first, across word borders)."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=-1, bitorder="little")
    digits = stream.reshape(words.shape[0], -1, bits)
    weights = (1 << np.arange(bits, dtype=np.uint16)).astype(np.uint8)
    return np.asarray((digits * weights).sum(axis=-1, dtype=np.uint8))


def pack(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """The inverse of `unpack`."""
    digits = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    stream = np.packbits(digits.reshape(codes.shape[0], -1), axis=-1, bitorder="little")
    return np.ascontiguousarray(stream).view(np.uint32)


class PermutedRows(Weight):
    """`inner` with every block of `len(order)` rows rearranged: row i of a block comes from row order[i]."""

    def __init__(self, inner: Weight, order: NDArray[np.intp], shape: tuple[int, ...] | None = None) -> None:
        self.inner, self.order, self.shape = inner, order, shape or inner.shape

    def span(self, start: int, stop: int) -> tuple[int, int, NDArray[np.intp]]:
        """The rows of `inner` that hold rows `start:stop`, and which of them are wanted."""
        size = len(self.order)
        first, last = start // size * size, -(-stop // size) * size
        wanted = np.arange(start, stop)
        return first, last, wanted // size * size + self.order[wanted % size] - first

    def floats(self, start: int, stop: int) -> Floats:
        first, last, wanted = self.span(start, stop)
        return self.inner.floats(first, last)[wanted]

    def blocks(self, start: int, stop: int) -> Blocks | None:
        first, last, wanted = self.span(start, stop)
        found = self.inner.blocks(first, last)
        if found is None:
            return None
        biases = None if found.biases is None else found.biases[wanted]
        return Blocks(found.mode, found.bits, found.codes[wanted], found.scales[wanted], biases)


class PermutedVector(Weight):
    """A vector (one row) whose elements are rearranged block by block."""

    def __init__(self, inner: Weight, order: NDArray[np.intp]) -> None:
        self.inner, self.order, self.shape = inner, order, inner.shape

    def floats(self, start: int, stop: int) -> Floats:
        values = self.inner.floats(start, stop)
        return values.reshape(values.shape[0], -1, len(self.order))[..., self.order].reshape(values.shape)


class Scaled(Weight):
    """(inner + shift) · factor, computed in float32."""

    def __init__(self, inner: Weight, *, factor: float = 1.0, shift: float = 0.0) -> None:
        self.inner, self.factor, self.shift, self.shape = inner, np.float32(factor), np.float32(shift), inner.shape

    def floats(self, start: int, stop: int) -> Floats:
        return (self.inner.floats(start, stop) + self.shift) * self.factor


class Reshaped(Weight):
    """The same values in another shape; the last dimension stays, unless all of it is one row."""

    def __init__(self, inner: Weight, shape: tuple[int, ...]) -> None:
        self.inner, self.shape = inner, shape

    def floats(self, start: int, stop: int) -> Floats:
        if self.inner.shape[-1] == self.shape[-1]:
            return self.inner.floats(start, stop)
        return self.inner.floats(0, self.inner.rows).reshape(-1, self.shape[-1])[start:stop]


class Stacked(Weight):
    """Vectors of one length as the rows of a matrix."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self.parts, self.shape = parts, (len(parts), parts[0].shape[-1])

    def floats(self, start: int, stop: int) -> Floats:
        return np.concatenate([part.floats(0, 1) for part in self.parts[start:stop]])


class Numbers(Weight):
    """Values that are at hand already."""

    def __init__(self, values: Floats) -> None:
        self.values, self.shape = values, values.shape

    def floats(self, start: int, stop: int) -> Floats:
        return self.values.reshape(-1, self.shape[-1])[start:stop]


def model_weights(directory: Path, config: dict[str, Any]) -> dict[str, Weight]:
    """Every weight of an MLX model directory by its parameter path, quantized ones as one Weight.

    Raises ModelError when there are no weights or a listed file is missing, FormatError when a header is malformed.
    """
    stored: dict[str, StoredTensor] = {}
    for path in weight_files(directory):
        for name, tensor in stored_tensors(path).items():
            if name in stored:
                raise FormatError.of(
                    f"{path}: a tensor stands in two files", [Problem(name, f"also in {stored[name].path}")]
                )
            stored[name] = tensor
    weights: dict[str, Weight] = {}
    for name, tensor in stored.items():
        base, _, kind = name.rpartition(".")
        if f"{base}.scales" in stored and kind in ("scales", "biases", "weight"):
            if kind == "weight":
                weights[name] = quantized(base, stored, config)
        else:
            weights[name] = PlainWeight(tensor) if tensor.dtype in FLOATING else Stored(tensor)
    return weights


class Stored(Weight):
    """A tensor that is no floating-point weight; it has a shape and cannot be read as one."""

    def __init__(self, stored: StoredTensor) -> None:
        self.stored, self.shape = stored, stored.shape

    def floats(self, start: int, stop: int) -> Floats:
        where = Problem(self.stored.name, f"stored as {self.stored.dtype}, expected floating-point numbers")
        raise FormatError.of(f"{self.stored.path}: not a weight", [where])


def quantized(base: str, stored: dict[str, StoredTensor], config: dict[str, Any]) -> QuantizedWeight:
    """The quantized weight of module `base`, by config.json's `quantization` with its per-module entries."""
    settings = config.get("quantization") or config.get("quantization_config") or {}
    own = settings.get(base)
    settings = {**settings, **own} if isinstance(own, dict) else settings
    mode = settings.get("mode", "affine")
    group, bits = settings.get("group_size"), settings.get("bits")
    if not isinstance(group, int) or not isinstance(bits, int):
        raise ModelError(
            f"config.json: {base} is quantized, but 'quantization' does not say with which group_size and bits."
        )
    return QuantizedWeight(
        stored[f"{base}.weight"],
        stored[f"{base}.scales"],
        stored.get(f"{base}.biases"),
        bits=bits,
        group=group,
        mode=mode,
    )
