"""Packing a changed weight so that the change survives.

A packed weight plus a small change lies between the points of the grid. Rounding each weight to the nearest point
loses the change where it is small against the grid's step; drawing a new grid shifts every weight by a random part of
a step. Here the grid of the base stays, and the columns are rounded one after the other; what rounding one column
does wrong to the layer's output is made good in the columns after it, as far as inputs are correlated (GPTQ,
https://arxiv.org/abs/2210.17323). As the base itself lies on its grid, only the change has to be made good, not the
rounding of a whole weight.

    rows R (outputs; for experts: of all experts)      width C (inputs)      H = mean of x xᵀ over calibration inputs
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from mlxlora.adapters import weights
from mlxlora.adapters.weights import Quantization
from mlxlora.parameters import number

Array = npt.NDArray[np.float32]
DAMPING = 0.01  # of the mean of H's diagonal: how little the calibration inputs are trusted where they say little
BLOCK = 64  # columns whose corrections are applied to the rest at once


@dataclass(frozen=True, slots=True)
class Grid:
    """The points that each weight of a packed layer may take: `offset + step · level`, with one level a code.

    step, offset: float32 [R, C / group]
    levels:       float32 [codes], by code
    """

    packed: Quantization
    step: Array
    offset: Array
    levels: Array

    @classmethod
    def of(cls, layer: nn.Module) -> Grid:
        """The grid that a packed layer lies on."""
        packed = weights.quantization(layer)
        assert packed is not None
        groups = layer["scales"].shape[-1]
        if packed.mode == "affine":
            step = _array(layer["scales"]).reshape(-1, groups)
            offset = _array(layer["biases"]).reshape(-1, groups)
            return cls(packed, step, offset, np.arange(2**packed.bits, dtype=np.float32))
        levels = _levels(packed)
        largest = int(np.nanargmax(levels))
        ones = _packed_codes(np.full((1, packed.group_size), largest, np.uint8), packed.bits)
        scales = layer["scales"].reshape(-1, 1)
        each = mx.dequantize(
            mx.broadcast_to(mx.array(ones), (scales.shape[0], ones.shape[1])),
            scales,
            group_size=packed.group_size,
            bits=packed.bits,
            mode=packed.mode,
            dtype=mx.float32,
        )[:, 0]
        step = _array(each).reshape(-1, groups) / levels[largest]
        return cls(packed, step, np.zeros_like(step), levels)

    def nearest(self, values: Array, group: int) -> tuple[npt.NDArray[np.uint8], Array]:
        """Codes and values of the points nearest to `values` [R, columns] in one group of columns."""
        step, offset = self.step[:, group, None], self.offset[:, group, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            scaled = np.where(step != 0, (values - offset) / step, 0)
        if self.packed.mode == "affine":
            codes = np.clip(np.rint(scaled), 0, len(self.levels) - 1).astype(np.uint8)
        else:
            order, middles = _ordered(self.packed)
            codes = order[np.searchsorted(middles, scaled)]
        return codes, (self.levels[codes] * step + offset).astype(np.float32)


def pack_with_care(layer: nn.Module, target: mx.array, inputs: Array | None) -> nn.Module:
    """A layer packed as `layer` is that computes as nearly as possible what the weight `target` would.

    Of rounding to nearest, feedback on the grid of `layer` and feedback on a grid drawn for `target`: the one whose
    output is nearest on the calibration inputs.
    target: float32 in the unpacked shape
    inputs: H [C, C] of what the layer sees, or None where that is not known: then the nearest points are taken
    """
    packed = weights.quantization(layer)
    nearest = weights.like(layer, target, packed)
    if inputs is None or layer.get("global_scale") is not None:
        return nearest
    spread = _feedback(inputs, DAMPING)
    wanted = _array(target).reshape(-1, target.shape[-1])
    made = [nearest, *(_on_grid(one, wanted, spread) for one in (layer, nearest))]
    return min(made, key=lambda one: output_error(one, wanted, inputs))


def output_error(layer: nn.Module, wanted: Array, inputs: Array) -> float:
    """The mean square by which the outputs of a packed layer differ from those of the weight `wanted` [R, C]."""
    difference = mx.array(_array(weights.dense(layer)).reshape(wanted.shape) - wanted)
    return number(mx.sum((difference @ mx.array(inputs)) * difference))


def _on_grid(layer: nn.Module, wanted: Array, spread: Array | None) -> nn.Module:
    """A layer on the grid of `layer` whose weights are rounded to `wanted`, with feedback where `spread` is given."""
    grid = Grid.of(layer)
    codes = _rounded(grid, wanted.copy(), spread)
    words = _packed_codes(codes, grid.packed.bits).reshape(layer["weight"].shape)
    kept = {name: layer[name] for name in ("scales", "biases") if layer.get(name) is not None}
    return weights.assemble(layer, {"weight": mx.array(words), **kept}, grid.packed)


def _rounded(grid: Grid, wanted: Array, feedback: Array | None) -> npt.NDArray[np.uint8]:
    """Codes [R, C]. `wanted` is used up: what is still to be made good is added to it on the way."""
    width, group = wanted.shape[1], grid.packed.group_size
    codes = np.empty(wanted.shape, np.uint8)
    if feedback is None:
        for start in range(0, width, group):
            codes[:, start : start + group], _ = grid.nearest(wanted[:, start : start + group], start // group)
        return codes
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        errors = np.empty((wanted.shape[0], stop - start), np.float32)
        for column in range(start, stop):
            codes[:, column : column + 1], got = grid.nearest(wanted[:, column : column + 1], column // group)
            errors[:, column - start] = (wanted[:, column] - got[:, 0]) / feedback[column, column]
            if column + 1 < stop:
                row = feedback[column, column + 1 : stop]
                wanted[:, column + 1 : stop] -= np.outer(errors[:, column - start], row)
        if stop < width:
            wanted[:, stop:] -= errors @ feedback[start:stop, stop:]
    return codes


def _feedback(inputs: Array, damping: float) -> Array:
    """The upper Cholesky factor of H⁻¹: row j says how the error of column j is spread over the columns after it."""
    h = inputs.astype(np.float64)
    mean = float(np.mean(np.diag(h)))
    h[np.diag_indices_from(h)] += damping * mean if mean > 0 else 1.0
    return np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)


def _array(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32))


def _packed_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint32]:
    """Codes [R, C] as MLX packs them: a stream of bits, lowest first, in 32-bit words."""
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    words: npt.NDArray[np.uint32] = np.packbits(stream.reshape(len(codes), -1), axis=-1, bitorder="little").view("<u4")
    return words


def _levels(packed: Quantization) -> Array:
    """The values of all codes of a floating mode at scale 1, by asking MLX to unpack them."""
    count = max(2**packed.bits, 64)  # MLX unpacks no fewer
    codes = (np.arange(count) % 2**packed.bits).astype(np.uint8)[None]
    one = {"nvfp4": 0x38}.get(packed.mode, 127)  # 1.0 as E4M3, and as a power of two
    unpacked = mx.dequantize(
        mx.array(_packed_codes(codes, packed.bits)),
        mx.full((1, count // packed.group_size), one, mx.uint8),
        group_size=packed.group_size,
        bits=packed.bits,
        mode=packed.mode,
        dtype=mx.float32,
    )
    return _array(unpacked)[0, : 2**packed.bits]


def _ordered(packed: Quantization) -> tuple[npt.NDArray[np.uint8], Array]:
    """The codes in the order of their values (each value once), and the middles between neighbours."""
    levels = _levels(packed)
    values, codes = np.unique(levels[np.isfinite(levels)], return_index=True)
    finite = np.flatnonzero(np.isfinite(levels))
    return finite[codes].astype(np.uint8), ((values[1:] + values[:-1]) / 2).astype(np.float32)
