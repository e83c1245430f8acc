"""The LoRA layers, held against the plain matrix computation, for every kind of base layer."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlxlora.adapters import LayerConfig, LoRAEmbedding, LoRALinear, LoRASwitchLinear, set_dropout_keys, weights

CONFIG = LayerConfig(rank=4, scale=2.0)
MODES = [("affine", bits, group) for bits, group in [(2, 32), (3, 64), (4, 64), (5, 32), (6, 128), (8, 64)]]
MODES += [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
PACKED = [pytest.param(None, id="plain"), *(pytest.param(mode, id=f"{mode[0]}-{mode[1]}") for mode in MODES)]


def packed(layer, mode):
    return layer if mode is None else layer.to_quantized(group_size=mode[2], bits=mode[1], mode=mode[0])


def stirred(layer, seed=7):
    """The wrapped layer with both factors away from zero."""
    keys = mx.random.split(mx.random.key(seed))
    layer.lora_a = mx.random.normal(layer.lora_a.shape, scale=0.1, key=keys[0])
    layer.lora_b = mx.random.normal(layer.lora_b.shape, scale=0.1, key=keys[1])
    return layer


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert float(mx.abs(a - b).max()) <= tolerance * max(1.0, float(mx.abs(b).max()))


@pytest.mark.parametrize("mode", PACKED)
def test_linear(mode):
    base = packed(nn.Linear(128, 48, bias=True), mode)
    layer = LoRALinear.wrap(base, CONFIG, mx.random.key(1))
    x = mx.random.normal((3, 5, 128), key=mx.random.key(2))
    assert (layer.input_dims, layer.output_dims) == (128, 48)
    assert mx.array_equal(layer(x), base(x))
    assert layer.fuse() is base, "a fresh adapter changes nothing"
    stirred(layer)
    close(layer(x), base(x) + 2.0 * ((x @ layer.lora_a) @ layer.lora_b))
    close(layer.fuse(dequantize=True)(x), layer(x))
    fused = layer.fuse()
    assert type(fused) is type(base)
    assert weights.quantization(fused) == weights.quantization(base)
    assert {k: (v.shape, v.dtype) for k, v in fused.items()} == {k: (v.shape, v.dtype) for k, v in base.items()}


@pytest.mark.parametrize("mode", PACKED)
def test_embedding_tied(mode):
    base = packed(nn.Embedding(96, 128), mode)
    layer = LoRAEmbedding.wrap(base, CONFIG, mx.random.key(1))
    tokens = mx.array([[1, 5, 9], [95, 0, 5]])
    x = mx.random.normal((2, 3, 128), key=mx.random.key(2))
    assert (layer.input_dims, layer.output_dims) == (96, 128)
    assert mx.array_equal(layer(tokens), base(tokens))
    assert mx.array_equal(layer.as_linear(x), base.as_linear(x))
    stirred(layer)
    delta = 2.0 * layer.lora_a @ layer.lora_b
    half = mode is not None and mode[0] != "affine"  # MLX looks up embeddings of these modes in bfloat16
    close(layer(tokens), base(tokens) + delta[tokens], 1e-2 if half else 1e-5)
    close(layer.as_linear(x), base.as_linear(x) + x @ delta.T)
    fused = layer.fuse(dequantize=True)
    close(fused(tokens), layer(tokens), 1e-2 if half else 1e-5)
    close(fused.as_linear(x), layer.as_linear(x))
    assert type(layer.fuse()) is type(base)


@pytest.mark.parametrize("mode", PACKED)
def test_experts(mode):
    base = packed(SwitchLinear(128, 48, num_experts=3, bias=True), mode)
    layer = stirred(LoRASwitchLinear.wrap(base, CONFIG, mx.random.key(1)))
    x = mx.random.normal((2, 5, 1, 1, 128), key=mx.random.key(2))
    chosen = mx.random.randint(0, 3, (2, 5, 2), key=mx.random.key(3))
    y = layer(x, chosen)
    dense = weights.dense(base) + 2.0 * (layer.lora_b @ layer.lora_a)
    for i in range(2):
        for j in range(5):
            for k in range(2):
                expert = chosen[i, j, k].item()
                close(y[i, j, k, 0], dense[expert] @ x[i, j, 0, 0] + base.bias[expert], 2e-5)
    close(layer.fuse(dequantize=True)(x, chosen), y, 2e-5)
    fused = layer.fuse()
    assert type(fused) is type(base)
    assert {k: (v.shape, v.dtype) for k, v in fused.items()} == {k: (v.shape, v.dtype) for k, v in base.items()}


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("mode", [None, ("affine", 4, 64), ("mxfp4", 4, 32)])
def test_forward_and_fuse_stay_in_the_base_dtype(dtype, mode):
    plain = nn.Linear(128, 64)
    plain.set_dtype(dtype)
    base = packed(plain, mode)
    layer = stirred(LoRALinear.wrap(base, CONFIG))
    assert layer(mx.ones((2, 128), dtype)).dtype == dtype
    assert layer.lora_a.dtype == mx.float32
    assert {k: v.dtype for k, v in layer.fuse().items()} == {k: v.dtype for k, v in base.items()}


def test_models_that_read_the_weight_themselves_get_the_adapted_one():
    base = nn.Embedding(20, 32)
    layer = stirred(LoRAEmbedding.wrap(base, CONFIG))
    x = mx.random.normal((2, 32))
    close(x @ layer.weight.T, layer.as_linear(x))
    quantized = LoRALinear.wrap(nn.Linear(64, 8).to_quantized(64, 4), CONFIG)
    assert (quantized.group_size, quantized.bits, quantized.scales.shape) == (64, 4, (8, 1))


class TestDropout:
    def layer(self, dropout=0.5):
        return stirred(LoRALinear.wrap(nn.Linear(64, 16), LayerConfig(4, 1.0, dropout)))

    def test_off_without_a_key(self):
        layer, x = self.layer(), mx.ones((8, 64))
        assert mx.array_equal(layer(x), self_without_dropout(layer)(x))

    def test_a_key_says_the_mask(self):
        layer, x = self.layer(), mx.ones((8, 64))
        set_dropout_keys(layer, mx.random.key(5))
        first, again = layer(x), layer(x)
        set_dropout_keys(layer, mx.random.key(6))
        other = layer(x)
        set_dropout_keys(layer, None)
        assert mx.array_equal(first, again)
        assert not mx.array_equal(first, other)
        assert mx.array_equal(layer(x), self_without_dropout(layer)(x))

    def test_mean_and_rate(self):
        layer = self.layer(0.25)
        set_dropout_keys(layer, mx.random.key(0))
        dropped = layer.drop(mx.ones((400, 64)))
        assert (dropped == 0).mean().item() == pytest.approx(0.25, abs=0.01)
        assert dropped.mean().item() == pytest.approx(1.0, abs=0.02)

    def test_layers_get_different_masks_in_path_order(self):
        pair = [self.layer(), self.layer()]
        network = nn.Sequential(*pair)
        set_dropout_keys(network, mx.random.key(3))
        masks = [layer.drop(mx.ones((64,))) for layer in pair]
        assert not mx.array_equal(*masks)
        set_dropout_keys(network, mx.random.key(3))
        assert all(mx.array_equal(a, b.drop(mx.ones((64,)))) for a, b in zip(masks, pair, strict=True))

    def test_the_key_is_no_state_of_the_model(self):
        layer = self.layer()
        before = set(layer.keys())
        set_dropout_keys(layer, mx.random.key(3))
        assert set(layer.keys()) == before


def self_without_dropout(layer):
    plain = LoRALinear(layer.base, LayerConfig(layer.rank, layer.scale))
    plain.lora_a, plain.lora_b = layer.lora_a, layer.lora_b
    return plain
