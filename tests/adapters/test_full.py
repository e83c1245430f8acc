"""Full fine-tuning: masters in float32, the forward pass in the base's dtype, and the way back."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest

from mlxlora.adapters import AdapterConfig, collect, inject, remove
from mlxlora.errors import ConfigError
from mlxlora.parameters import flat
from tests import tiny

TOKENS = mx.arange(24)[None]


def loss(network):
    logits = network(TOKENS[:, :-1]).astype(mx.float32)
    return nn.losses.cross_entropy(logits, TOKENS[:, 1:], reduction="mean")


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_the_forward_pass_does_not_change(family):
    network = tiny.network(family, dtype=mx.bfloat16)
    before = network(TOKENS)
    names = list(flat(network.parameters()))
    injection = inject(network, AdapterConfig(type="full"))
    after = network(TOKENS)
    assert after.dtype == before.dtype == mx.bfloat16
    assert mx.array_equal(after, before)
    trained = flat(network.trainable_parameters())
    assert sorted(trained) == sorted(names), "paths stay as they are"
    assert {array.dtype for array in trained.values()} == {mx.float32}
    assert injection.trainable == injection.total


def descend(network, steps=100):
    """How far the loss falls with steps far below the resolution of bfloat16."""
    optimizer = optim.SGD(1e-3)
    first = loss(network).item()
    step = nn.value_and_grad(network, lambda: loss(network))
    for _ in range(steps):
        optimizer.update(network, step()[1])
        mx.eval(network.parameters())
    return first - loss(network).item()


def test_steps_too_small_for_bfloat16_add_up_in_the_masters():
    plain = tiny.network("llama", dtype=mx.bfloat16)
    plain.freeze()
    plain.lm_head.unfreeze()
    exact = tiny.network("llama")
    exact.freeze()
    exact.lm_head.unfreeze()
    network = tiny.network("llama", dtype=mx.bfloat16)
    inject(network, AdapterConfig(type="full", targets=["lm_head"]))
    expected = descend(exact)
    assert descend(network) == pytest.approx(expected, rel=0.1)
    assert descend(plain) < 0.5 * expected
    assert network.lm_head.weight.dtype == mx.bfloat16
    (weight,) = collect(network).weights.values()
    assert weight.dtype == mx.bfloat16


def test_everything_comes_back():
    network = tiny.network("llama", dtype=mx.bfloat16)
    arrays = {path: id(array) for path, array in flat(network.parameters()).items()}
    classes = [type(module) for module in network.modules()]
    inject(network, AdapterConfig(type="full"))
    network.update({"lm_head": {"weight": mx.zeros((512, 32))}})
    remove(network)
    assert {path: id(array) for path, array in flat(network.parameters()).items()} == arrays
    assert [type(module) for module in network.modules()] == classes
    assert all("_narrow" not in vars(module) for module in network.modules())


def test_only_what_was_asked_for_trains():
    network = tiny.network("llama")
    injection = inject(network, AdapterConfig(type="full", targets=["attention", "norm"], layers=1))
    names = set(flat(network.trainable_parameters()))
    expected = {f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkvo"} | {"model.norm.weight"}
    assert names == expected
    assert set(injection.paths) == {name.removesuffix(".weight") for name in expected}


def test_quantized_weights_are_refused():
    network = tiny.network("llama")
    nn.quantize(network, group_size=32, bits=4)
    with pytest.raises(ConfigError, match="quantized"):
        inject(network, AdapterConfig(type="full", targets=["all-linear"]))
