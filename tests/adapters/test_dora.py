"""DoRA against the formula written out with dense weights, and against mlx-lm's layers."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner import dora as stock

from mlxlora.adapters import DoRAEmbedding, DoRALinear, LayerConfig, weights

CONFIG = LayerConfig(rank=4, scale=1.5)
MODES = [None, ("affine", 4, 64), ("affine", 3, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]


def packed(layer, mode):
    return layer if mode is None else layer.to_quantized(group_size=mode[2], bits=mode[1], mode=mode[0])


def stirred(layer):
    for number, name in enumerate(layer.learned):
        noise = mx.random.normal(layer[name].shape, key=mx.random.key(number))
        layer[name] = layer[name] + 0.1 * noise
    return layer


def dense(layer, product):
    rows = weights.dense(layer.base) + 1.5 * product
    return rows * (layer.m / mx.linalg.norm(rows, axis=-1))[:, None]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_linear(mode, close):
    base = packed(nn.Linear(128, 48), mode)
    x = mx.random.normal((3, 128), key=mx.random.key(9))
    fresh = DoRALinear.wrap(base, CONFIG, mx.random.key(1))
    close(fresh(x), base(x), 1e-6)
    assert fresh.fuse() is base
    layer = stirred(fresh)
    expected = x @ dense(layer, layer.lora_b.T @ layer.lora_a.T).T + base.bias
    close(layer(x), expected, 1e-5)
    close(base(x) + layer.effect(x, base(x)), expected, 1e-5)
    close(base(x) + layer.effect(x, base(x), layer.magnitude()), expected, 1e-5)
    close(layer.fuse(dequantize=True)(x), expected, 1e-5)
    assert type(layer.fuse()) is type(base)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_embedding(mode, close):
    base = packed(nn.Embedding(48, 128), mode)
    layer = stirred(DoRAEmbedding.wrap(base, CONFIG, mx.random.key(1)))
    table = dense(layer, layer.lora_a @ layer.lora_b)
    tokens, x = mx.array([[0, 47, 3]]), mx.random.normal((2, 128), key=mx.random.key(9))
    half = mode is not None and mode[0] != "affine"  # MLX looks up embeddings of these modes in bfloat16
    close(layer(tokens), table[tokens], 2e-2 if half else 1e-5)
    close(layer.as_linear(x), x @ table.T, 1e-5)
    close(layer.fuse(dequantize=True).as_linear(x), x @ table.T, 1e-5)


@pytest.mark.parametrize("mode", [None, ("affine", 4, 64), ("affine", 8, 32)], ids=str)
def test_same_numbers_and_gradients_as_mlx_lm(mode, close):
    base = packed(nn.Linear(128, 48), mode)
    ours = stirred(DoRALinear.wrap(base, CONFIG, mx.random.key(1)))
    theirs = stock.DoRALinear.from_base(base, r=4, scale=1.5)
    theirs.update({name: ours[name] for name in ours.learned})
    x = mx.random.normal((5, 128), key=mx.random.key(9))
    close(ours(x), theirs(x), 1e-5)

    def gradient(layer):
        layer.linear.freeze()
        return nn.value_and_grad(layer, lambda x: mx.square(layer(x)).sum())(x)[1]

    expected = gradient(theirs)
    for name, value in gradient(ours).items():
        if name in ours.learned:
            close(value, expected[name], 1e-5)
