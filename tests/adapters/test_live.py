"""Several adapters on one model: y = base + Σ sᵢ (adapterᵢ − base), for every kind of layer."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxlora import model
from mlxlora.adapters import AdapterConfig, Adapters, collect, inject, remove, save_adapter
from mlxlora.errors import AdapterError, ConfigError, UnsupportedError
from tests import tiny

TOKENS = mx.arange(3, 23)[None]


def adapter_for(stir, family, seed, **settings):
    network = tiny.network(family)
    stir(network, AdapterConfig(rank=4, alpha=8, **settings), seed=seed)
    return collect(network), network(TOKENS)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral"])
def test_one_at_full_scale_is_that_adapter_and_none_is_the_base(family, stir, close):
    targets = {"targets": ["all-linear", "output"]}
    first, with_first = adapter_for(stir, family, 1, **targets)
    second, with_second = adapter_for(stir, family, 2, type="lora" if family == "mixtral" else "dora", **targets)
    network = tiny.network(family)
    modules = {path: id(module) for path, module in network.named_modules()}
    base = network(TOKENS)
    adapters = Adapters(network)
    adapters.add(first, name="first", scale=0)
    adapters.add(second, name="second", scale=0)
    assert mx.array_equal(network(TOKENS), base)
    adapters["first"].scale = 1
    close(network(TOKENS), with_first)
    adapters.set_scales({"first": 0, "second": 1})
    close(network(TOKENS), with_second, 3e-5)
    assert adapters.scales == {"first": 0, "second": 1}
    adapters.remove("second")
    assert mx.array_equal(network(TOKENS), base)
    adapters.remove("first")
    assert {path: id(module) for path, module in network.named_modules()} == modules
    assert len(adapters) == 0


def test_the_sum_layer_by_layer(stir, close):
    lora, _ = adapter_for(stir, "llama", 1)
    dora, _ = adapter_for(stir, "llama", 2, type="dora")
    network = tiny.network("llama")
    adapters = Adapters(network)
    adapters.add(lora, name="lora", scale=0.7)
    adapters.add(dora, name="dora", scale=-0.4)
    slot = network.layers[0].mlp.down_proj
    x = mx.random.normal((2, 64))
    base = slot.base(x)
    parts = {owner.name: layer(x) for owner, layer, _ in slot.parts}
    expected = base + 0.7 * (parts["lora"] - base) - 0.4 * (parts["dora"] - base)
    close(slot(x), expected)
    close(x @ slot.adapted().T, expected)
    close(slot.fuse()(x), expected)


def test_off_calls_the_base_alone(stir):
    lora, _ = adapter_for(stir, "llama", 1)
    network = tiny.network("llama")
    adapters = Adapters(network)
    adapters.add(lora, name="a", scale=0)
    for _, layer, _ in network.layers[0].mlp.down_proj.parts:
        layer.effect = None  # calling it would fail
    network(TOKENS)
    assert not network.layers[0].mlp.down_proj.changes()


def test_names(stir, tmp_path):
    lora, _ = adapter_for(stir, "llama", 1)
    save_adapter(tmp_path / "style" / "adapter", lora)
    adapters = Adapters(tiny.network("llama"))
    assert adapters.add(tmp_path / "style").name == "style"
    assert adapters.add_spec(f"{tmp_path / 'style'}=0.25").name == "style-2"
    assert adapters.scales == {"style": 1.0, "style-2": 0.25}
    assert "rank 4" in str(adapters)
    with pytest.raises(AdapterError, match="called 'style' already"):
        adapters.add(lora, name="style")
    with pytest.raises(AdapterError, match="Did you mean 'style'"):
        adapters["stile"]
    with pytest.raises(AdapterError, match="cannot be right"):
        adapters["style"].scale = float("nan")
    assert adapters["style"].scale == 1.0


def test_training_and_live_adapters_do_not_mix(stir):
    lora, _ = adapter_for(stir, "llama", 1)
    network = tiny.network("llama")
    adapters = Adapters(network)
    adapters.add(lora, name="a")
    with pytest.raises(ConfigError, match="already"):
        inject(network, AdapterConfig())
    adapters.clear()
    inject(network, AdapterConfig())
    with pytest.raises(ConfigError, match="trains"):
        adapters.add(lora)
    remove(network)
    adapters.add(lora)


def test_weights_of_two_full_adapters_add_up(stir, close):
    network = tiny.network("llama")
    base = network.lm_head.weight
    adapters = Adapters(network, lambda: "b" * 64)
    changed = []
    for seed in (1, 2):
        trained = tiny.network("llama")
        stir(trained, AdapterConfig(type="full", targets=["output"]), seed=seed)
        changed.append(trained.lm_head.weight)
        adapters.add(collect(trained, base="b" * 64), name=str(seed), scale=0.5 * seed)
    close(network.lm_head.weight, base + 0.5 * (changed[0] - base) + (changed[1] - base))
    lora, _ = adapter_for(stir, "llama", 1, targets=["lm_head", "q_proj"])
    adapters.add(lora, name="lora")
    adapters["2"].scale = 0
    close(network.lm_head.base.weight, base + 0.5 * (changed[0] - base))
    with pytest.raises(UnsupportedError, match="dora"):
        adapters.add(adapter_for(stir, "llama", 1, type="dora")[0])
    adapters.clear()
    assert network.lm_head.weight is base


def test_a_language_model_has_them(tmp_path, stir, close):
    directory = tiny.model_directory(tmp_path / "model", "llama")
    loaded, _ = model.load_network(directory)
    stir(loaded, AdapterConfig(rank=4, alpha=8))
    expected = loaded(TOKENS)
    save_adapter(tmp_path / "run" / "adapter", collect(loaded, base=model.fingerprint(directory)))
    network, config = model.load_network(directory)
    tokenizer: Any = None
    language_model = model.LanguageModel(network, tokenizer, config, directory)
    base = network(TOKENS)
    language_model.adapters.add_spec(f"{tmp_path / 'run'}=1")
    close(network(TOKENS), expected)
    language_model.adapters["run"].scale = 0
    assert mx.array_equal(network(TOKENS), base)
    other = tiny.model_directory(tmp_path / "other", "llama", seed=4)
    with pytest.raises(AdapterError, match="was made for"):
        model.LanguageModel(network, tokenizer, config, other).adapters.add(tmp_path / "run")


def test_quantized_bases(stir, close):
    network = tiny.network("llama")
    nn.quantize(network, group_size=32, bits=3)
    stir(network, AdapterConfig(rank=4, alpha=8, type="dora", targets=["all-linear", "output"]))
    expected, adapter = network(TOKENS), collect(network)
    remove(network)
    Adapters(network).add(adapter)
    close(network(TOKENS), expected)
