"""Rounding with feedback: on the grid of the base, nearer in what the layer puts out than rounding each weight."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlxlora.adapters import weights
from mlxlora.fusing.rounding import Grid, _on_grid, output_error, pack_with_care

MODES = [("affine", bits, group) for bits, group in [(2, 32), (3, 64), (4, 64), (5, 32), (6, 32), (8, 128)]]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
each_mode = pytest.mark.parametrize("mode", MODES, ids=lambda mode: f"{mode[0]}-{mode[1]}")


def layer_of(mode, rows=48, width=256):
    mx.random.seed(0)
    return nn.Linear(width, rows).to_quantized(group_size=mode[2], bits=mode[1], mode=mode[0])


def inputs(width=256, hidden=24, count=2000):
    """Inputs as those of real layers: a few directions carry most of them."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(count, hidden)) @ rng.normal(size=(hidden, width)) + 0.3 * rng.normal(size=(count, width))
    return x.astype(np.float32)


def changed(layer, size, rank=8):
    rng = np.random.default_rng(2)
    base = np.array(weights.dense(layer))
    delta = rng.normal(size=(base.shape[0], rank)) @ rng.normal(size=(rank, base.shape[1]))
    return mx.array((base + delta * size * np.linalg.norm(base) / np.linalg.norm(delta)).astype(np.float32))


@each_mode
def test_the_grid_and_the_packing_are_those_of_mlx(mode):
    layer = layer_of(mode)
    again = _on_grid(layer, np.array(weights.dense(layer)), None)
    assert mx.array_equal(weights.dense(again), weights.dense(layer))
    grid = Grid.of(layer)
    assert grid.step.shape == (48, 256 // mode[2])
    values = np.array(weights.dense(layer)) + 0.3 * np.abs(grid.step).repeat(mode[2], 1)
    near = np.array(weights.dense(_on_grid(layer, values.astype(np.float32), None)))
    points = grid.levels[np.isfinite(grid.levels)]
    step, offset = (array.repeat(mode[2], 1) for array in (grid.step, grid.offset))
    for row in range(0, 48, 7):
        each = points[None] * step[row][:, None] + offset[row][:, None]
        best = np.abs(each - values[row][:, None]).min(axis=1)
        np.testing.assert_allclose(np.abs(near[row] - values[row]), best, atol=1e-6)


@each_mode
def test_no_change_moves_no_code(mode):
    layer = layer_of(mode)
    x = inputs()
    assert output_error(layer, np.array(weights.dense(layer)), x.T @ x / len(x)) == 0
    same = _on_grid(layer, np.array(weights.dense(layer)), np.eye(256, dtype=np.float32))
    assert mx.array_equal(same.weight, layer.weight)


@each_mode
def test_feedback_saves_what_nearest_loses(mode):
    layer = layer_of(mode)
    target = changed(layer, 0.3 if mode[1] == 2 else 0.08)
    x = inputs()
    moment = x.T @ x / len(x)
    wanted = np.array(target)
    nearest = weights.like(layer, target, weights.quantization(layer))
    careful = pack_with_care(layer, target, moment)
    before, after = output_error(nearest, wanted, moment), output_error(careful, wanted, moment)
    assert after < 0.6 * before
    # the figure is what it says: measured on the outputs themselves
    difference = x @ (np.array(weights.dense(careful)) - wanted).T
    assert after == pytest.approx(np.square(difference).sum(axis=1).mean(), rel=1e-3)


def test_without_inputs_the_nearest_points_are_taken():
    layer = layer_of(("affine", 4, 64))
    target = changed(layer, 0.05)
    nearest = weights.like(layer, target, weights.quantization(layer))
    assert mx.array_equal(pack_with_care(layer, target, None).weight, nearest.weight)
