"""Adapter directories: read and written by us and by mlx-lm, and every kind of damage refused."""

import json
import random
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlxlora.adapters import AdapterConfig, Adapters, collect, inject, load_adapter, read_adapter, remove, save_adapter
from mlxlora.adapters.files import find, parse_spec
from mlxlora.errors import AdapterError, InputError
from mlxlora.parameters import flat
from tests import tiny

TOKENS = mx.arange(3, 23)[None]
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5.0}}
CASES = [
    pytest.param("llama", {}, None, id="llama"),
    pytest.param("qwen3", {"targets": ["all-linear", "output"], **PATTERNS}, None, id="tied-patterns"),
    pytest.param("qwen3_moe", {"targets": ["all-linear", "lm_head"]}, None, id="experts"),
    pytest.param("llama", {"type": "dora", **PATTERNS}, None, id="dora"),
    pytest.param("llama", {"layers": [0], "rslora": True}, ("affine", 5, 32), id="5bit"),
    pytest.param("llama", {}, ("mxfp4", 4, 32), id="mxfp4"),
    pytest.param("mixtral", {}, ("nvfp4", 4, 16), id="nvfp4-experts"),
]


def build(family, mode, dtype=mx.float32):
    network = tiny.network(family, dtype=dtype)
    if mode:
        nn.quantize(network, group_size=mode[2], bits=mode[1], mode=mode[0])
    return network


@pytest.mark.parametrize(("family", "settings", "mode"), CASES)
def test_mlx_lm_computes_the_same_with_our_adapter(family, settings, mode, tmp_path, stir, close):
    network = build(family, mode)
    stir(network, AdapterConfig(rank=4, alpha=8, **settings))
    expected = network(TOKENS)
    save_adapter(tmp_path / "a", collect(network, base="b" * 64))
    close(load_adapters(build(family, mode), str(tmp_path / "a"))(TOKENS), expected)

    again = build(family, mode)
    live = Adapters(again).add(tmp_path / "a")
    close(again(TOKENS), expected)
    live.scale = 0
    remove(network)
    assert mx.array_equal(again(TOKENS), network(TOKENS))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("keys", [None, ["self_attn.q_proj", "mlp.down_proj"]])
def test_we_compute_the_same_with_an_adapter_of_mlx_lm(dora, keys, tmp_path, close):
    network = build("llama", None)
    network.freeze()
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(network, 1, parameters, use_dora=dora)
    trained = [
        (name, array + 0.02 * mx.random.normal(array.shape, key=mx.random.key(i)))
        for i, (name, array) in enumerate(flat(network.trainable_parameters()).items())
    ]
    network.load_weights(trained, strict=False)
    expected = network(TOKENS)
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(trained))
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": 1, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "batch_size": 4, "model": "somewhere"}))
    fresh = build("llama", None)
    Adapters(fresh).add(tmp_path)
    close(fresh(TOKENS), expected)


def test_the_layout_of_2024(tmp_path):
    """`lora_layers` instead of `num_layers`, no fine_tune_type, an alpha that mlx-lm does not read."""
    network = build("llama", None)
    inject(network, AdapterConfig(rank=4, alpha=8))
    save_adapter(tmp_path / "a", collect(network))
    (tmp_path / "a" / "manifest.json").unlink()
    config = {"lora_layers": 2, "lora_parameters": {"rank": 4, "alpha": 16, "scale": 10.0, "dropout": 0.0}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    adapter = read_adapter(tmp_path / "a")
    assert (adapter.type, adapter.layers, adapter.base) == ("lora", 2, None)
    assert {module.scale for module in adapter.modules.values()} == {10.0}


def test_ranks_and_values_come_back(tmp_path, stir):
    network = build("qwen3", None)
    stir(network, AdapterConfig(rank=4, alpha=8, rank_pattern={"q_proj": 2}))
    before = collect(network, base="f" * 64, base_name="tiny")
    save_adapter(tmp_path / "a", before)
    after = read_adapter(tmp_path / "a")
    assert (after.base, after.base_name, after.layers, after.ranks) == ("f" * 64, "tiny", 2, [2, 4])
    assert after.config["rank_pattern"] == {"q_proj": 2}
    assert sorted(after.modules) == sorted(before.modules)
    fresh = build("qwen3", None)
    inject(fresh, AdapterConfig(rank=4, alpha=8, rank_pattern={"q_proj": 2}))
    load_adapter(fresh, tmp_path / "a")
    assert mx.allclose(fresh(TOKENS), network(TOKENS), atol=1e-6)


def test_full(tmp_path, stir):
    network = build("llama", None, mx.bfloat16)
    stir(network, AdapterConfig(type="full"), size=0.01)
    expected = network(TOKENS)
    save_adapter(tmp_path / "a", collect(network, base="b" * 64))
    fresh = build("llama", None, mx.bfloat16)
    base = fresh(TOKENS)
    adapters = Adapters(fresh, lambda: "b" * 64)
    live = adapters.add(tmp_path / "a", name="whole")
    assert mx.array_equal(fresh(TOKENS), expected)
    live.scale = 0
    assert mx.array_equal(fresh(TOKENS), base)
    stock = load_adapters(build("llama", None, mx.bfloat16), str(tmp_path / "a"))
    assert mx.array_equal(stock(TOKENS), expected)
    (tmp_path / "a" / "manifest.json").unlink()
    with pytest.raises(AdapterError, match="replace base weights"):
        read_adapter(tmp_path / "a")


class TestRefusals:
    @pytest.fixture
    def good(self, tmp_path, stir):
        network = build("llama", None)
        stir(network, AdapterConfig(rank=4, alpha=8, targets=["q_proj"]))
        return save_adapter(tmp_path / "good", collect(network, base="a" * 64, base_name="tiny"))

    def rewrite(self, directory, tensors=None, **config):
        """Change files behind the manifest's back; without a manifest, as one made by mlx-lm."""
        (directory / "manifest.json").unlink()
        if tensors is not None:
            mx.save_safetensors(str(directory / "adapters.safetensors"), tensors)
        path = directory / "adapter_config.json"
        content = json.loads(path.read_text())
        content["lora_parameters"] |= {k: v for k, v in config.items() if k in ("rank", "scale", "dropout")}
        content |= {k: v for k, v in config.items() if k == "fine_tune_type"}
        path.write_text(json.dumps(content))

    def refused(self, directory, *words):
        with pytest.raises(AdapterError) as caught:
            Adapters(build("llama", None), lambda: "a" * 64).add(directory)
        for word in words:
            assert word in str(caught.value)
        return caught.value

    def test_a_good_one_is_not(self, good):
        Adapters(build("llama", None), lambda: "a" * 64).add(good)

    @pytest.mark.parametrize("name", ["adapters.safetensors", "adapter_config.json"])
    def test_a_flipped_bit(self, good, name):
        content = bytearray((good / name).read_bytes())
        content[-5] ^= 4
        (good / name).write_bytes(content)
        self.refused(good, name) if name.endswith("json") else self.refused(good, name, "SHA-256")

    def test_a_truncated_file(self, good):
        content = (good / "adapters.safetensors").read_bytes()
        (good / "adapters.safetensors").write_bytes(content[: len(content) // 2])
        self.refused(good, "bytes")
        (good / "manifest.json").unlink()
        self.refused(good, "adapters.safetensors")

    @pytest.mark.parametrize("scale", [1e30, float("nan"), float("inf"), "2", None, True])
    def test_scales_that_cannot_be(self, good, scale):
        self.rewrite(good, scale=scale)
        self.refused(good, "scale", "expected")

    @pytest.mark.parametrize("kind", ["qlora", 3, None])
    def test_unknown_types(self, good, kind):
        self.rewrite(good, fine_tune_type=kind)
        self.refused(good, "lora, dora, full")

    def test_tensors_that_would_replace_base_weights(self, good):
        tensors = tiny.tensors(good / "adapters.safetensors")
        self.rewrite(good, {**tensors, "model.layers.0.self_attn.q_proj.weight": mx.zeros((32, 32))})
        self.refused(good, "q_proj.weight", "replace a weight of the base")

    def test_all_problems_at_once(self, good):
        tensors = tiny.tensors(good / "adapters.safetensors")
        del tensors["model.layers.0.self_attn.q_proj.lora_b"]
        tensors["model.layers.1.self_attn.q_proj.lora_a"] = mx.zeros((32, 5))
        tensors["model.embed_tokens.weight"] = mx.zeros((4, 4))
        self.rewrite(good, tensors)
        error = self.refused(good, "layers.0.self_attn.q_proj.lora_b", "rank 4", "embed_tokens")
        assert len(error.problems) == 3

    def test_not_finite(self, good):
        tensors = tiny.tensors(good / "adapters.safetensors")
        name = "model.layers.0.self_attn.q_proj.lora_b"
        tensors[name] = tensors[name] * float("nan")
        self.rewrite(good, tensors)
        self.refused(good, name, "not finite")

    def test_missing_files(self, good):
        for name in ("adapters.safetensors", "adapter_config.json"):
            copy = shutil.copytree(good, good.parent / f"without-{name}")
            (copy / name).unlink()
            self.refused(copy, name)

    def test_another_base(self, good):
        with pytest.raises(AdapterError, match="was made for tiny"):
            Adapters(build("llama", None), lambda: "c" * 64).add(good)

    def test_another_architecture(self, good):
        with pytest.raises(AdapterError) as caught:
            Adapters(tiny.network("gpt2")).add(good)
        assert len(caught.value.problems) == 2
        with pytest.raises(AdapterError, match=r"expected shape \[64, 4\], found \[32, 4\]"):
            Adapters(tiny.network("llama", hidden_size=64)).add(good)

    def test_an_existing_target(self, good):
        with pytest.raises(InputError, match="exists"):
            save_adapter(good, read_adapter(good))

    def test_a_manifest_of_the_future(self, good):
        manifest = json.loads((good / "manifest.json").read_text())
        (good / "manifest.json").write_text(json.dumps({**manifest, "format": 9}))
        self.refused(good, "format 1")


def mutated(value, rng):
    """JSON with one thing in it changed or missing."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if rng.random() < 0.15 else {**rest, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], mutated(value[i], rng), *value[i + 1 :]]
    return rng.choice([None, 1, -1, 1e308, "x", [], {}, True, [1], {"a": 1}, float("nan"), "../x", "manifest.json"])


def test_damaged_adapters_are_refused_or_the_same(tmp_path, stir):
    network = build("llama", None)
    stir(network, AdapterConfig(rank=2, targets=["q_proj"]))
    good = save_adapter(tmp_path / "good", collect(network, base="a" * 64))
    remove(network)
    weights = {path: module.arrays for path, module in read_adapter(good).modules.items()}
    rng = random.Random(0)
    refused = 0
    for number in range(400):
        copy = shutil.copytree(good, tmp_path / str(number))
        if number % 3 == 0:
            (copy / "manifest.json").unlink()
        names = ["adapter_config.json", "adapters.safetensors", "manifest.json"][: 2 if number % 3 == 0 else 3]
        path = copy / rng.choice(names)
        if path.suffix == ".json":
            path.write_text(json.dumps(mutated(json.loads(path.read_text()), rng)))
        else:
            content = bytearray(path.read_bytes())
            content[rng.randrange(400)] = rng.randrange(256)
            path.write_bytes(content)
        adapters = Adapters(network, lambda: "a" * 64)
        try:
            live = adapters.add(copy)
        except InputError:
            refused += 1
        else:
            if (copy / "manifest.json").exists():
                for name, module in live.adapter.modules.items():
                    assert all(mx.array_equal(weights[name][part], array) for part, array in module.arrays.items())
            adapters.clear()
        shutil.rmtree(copy)
    assert refused > 250


def test_where_an_adapter_is_found(tmp_path):
    network = build("llama", None)
    inject(network, AdapterConfig(rank=2, targets=["q_proj"]))
    run = tmp_path / "run"
    with pytest.raises(AdapterError, match="no adapter at"):
        find(run)
    save_adapter(run / "adapter", collect(network))
    assert find(run) == run / "adapter"
    save_adapter(run / "best", collect(network))
    assert find(run) == run / "best"
    assert find(run / "adapter") == run / "adapter"
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_model.safetensors").touch()
    with pytest.raises(AdapterError, match="mlxlora import"):
        find(tmp_path / "peft")


def test_specs():
    assert parse_spec("a/b")[1] == 1.0
    assert (str(parse_spec("a/b=-0.5")[0]), parse_spec("a/b=-0.5")[1]) == ("a/b", -0.5)
    for wrong in ("a=b", "a=1e30", "a=nan"):
        with pytest.raises(AdapterError):
            parse_spec(wrong)
