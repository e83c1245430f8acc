"""Fusing: the same function in fp32, the bound on quantized bases, nothing changed by nothing, nothing half done."""

import filecmp
import json
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import utils as mlx_lm

from mlxlora import model as models
from mlxlora.adapters import AdapterConfig, Adapters, collect, inject, remove, save_adapter
from mlxlora.errors import AdapterError, ConfigError, InputError, MlxLoraError
from mlxlora.fuse import fuse
from mlxlora.parameters import flat
from tests import tiny

TOKENS = mx.arange(3, 43)[None]
ALL = {"targets": ["all-linear", "output"]}
MODES: dict[str, dict[str, Any]] = {
    **{f"{bits}bit": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)},
    "mxfp4": {"mode": "mxfp4", "bits": 4, "group_size": 32},
    "mxfp8": {"mode": "mxfp8", "bits": 8, "group_size": 32},
    "nvfp4": {"mode": "nvfp4", "bits": 4, "group_size": 16},
}


@pytest.fixture
def made(tmp_path, stir):
    """A model, adapters on it, and the logits of their sum."""

    def make(family="llama", mode=None, size=0.05, scales=(1.0,), changes=None, **settings):
        packed = MODES[mode] if mode else None
        directory = tiny.model_directory(tmp_path / "model", family, quantize=packed, **(changes or {}))
        paths = []
        for number, _ in enumerate(scales):
            network, _ = models.load_network(directory)
            config = AdapterConfig(
                **(settings if settings.get("type") == "full" else {"rank": 4, "alpha": 8, **settings})
            )
            if size:
                stir(network, config, seed=number + 1, size=size)
            else:
                inject(network, config)
            adapter = collect(network, base=models.fingerprint(directory), base_name="tiny")
            paths.append(save_adapter(tmp_path / f"adapter-{number}", adapter))
            remove(network)
        network, _ = models.load_network(directory)
        live = Adapters(network, lambda: models.fingerprint(directory))
        specs = [f"{path}={scale}" for path, scale in zip(paths, scales, strict=True)]
        for spec in specs:
            live.add_spec(spec)
        return directory, specs, network(TOKENS)

    return make


def stock_logits(directory):
    network, _ = mlx_lm.load_model(directory)
    return network(TOKENS)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("qwen3", ALL),
        ("mixtral", ALL),
        ("gpt2", {}),
        ("llama", {"type": "dora", **ALL}),
        ("llama", {"type": "full"}),
        ("deepseek_v3", {}),
    ],
)
def test_in_float32_it_is_the_adapter_on_its_base(made, tmp_path, family, settings):
    directory, specs, expected = made(family, **settings)
    result = fuse(str(directory), specs, tmp_path / "out")
    assert float(mx.abs(stock_logits(tmp_path / "out") - expected).max()) < 1e-4
    assert result.kl < 1e-6
    assert result.layers > 0
    assert "read back by mlx-lm" in str(result)
    names = {path.name for path in directory.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    same = names - {"model.safetensors"}
    assert filecmp.cmpfiles(directory, tmp_path / "out", same, shallow=False)[0] == sorted(same) or all(
        filecmp.cmp(directory / name, tmp_path / "out" / name, shallow=False) for name in same
    )


def test_several_with_scales(made, tmp_path):
    directory, specs, expected = made("llama", scales=(0.7, -0.4))
    result = fuse(str(directory), specs, tmp_path / "out")
    assert float(mx.abs(stock_logits(tmp_path / "out") - expected).max()) < 1e-4
    assert result.adapters == {"adapter-0": 0.7, "adapter-1": -0.4}


@pytest.mark.parametrize(
    ("family", "mode", "kind"),
    [
        *(("qwen3", mode, "lora") for mode in MODES),
        *(("mixtral", mode, "lora") for mode in ("4bit", "mxfp4", "mxfp8", "nvfp4")),
        *(("llama", mode, "dora") for mode in ("6bit", "mxfp8")),
    ],
)
def test_the_bound_is_kept_on_every_quantization(made, tmp_path, family, mode, kind):
    directory, specs, expected = made(family, mode, size=0.03, type=kind, **ALL)
    result = fuse(str(directory), specs, tmp_path / "out", max_kl=0.005)
    assert result.kl <= 0.005
    assert [one.difference.kl > 0.005 for one in result.tried] == [True] * (len(result.tried) - 1) + [False]
    got = stock_logits(tmp_path / "out").astype(mx.float32)
    reference = expected - mx.logsumexp(expected, axis=-1, keepdims=True)
    told = got - mx.logsumexp(got, axis=-1, keepdims=True)
    assert (mx.exp(reference) * (reference - told)).sum(-1).mean().item() < 0.02


def test_forms_cost_more_one_after_the_other(made, tmp_path):
    directory, specs, _ = made("llama", "3bit", **ALL)
    result = fuse(str(directory), specs, tmp_path / "out", max_kl=1e-7)
    assert result.form == "adapted layers unquantized"
    sizes = [one.bytes for one in result.tried]
    assert sizes == sorted(sizes)
    assert len(result.tried) == 2 * (1 + 4) + 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["lm_head"] is False
    assert "model.embed_tokens" not in config["quantization"]
    network, _ = mlx_lm.load_model(tmp_path / "out")
    assert "scales" in network.model.embed_tokens and "scales" not in network.lm_head


@pytest.mark.parametrize("mode", [None, *MODES])
def test_an_adapter_without_effect_changes_no_byte(made, tmp_path, mode):
    directory, specs, _ = made("mixtral", mode, size=0)
    result = fuse(str(directory), [*specs, f"{specs[0].rpartition('=')[0]}=0"], tmp_path / "out")
    assert (result.layers, result.kl) == (0, 0)
    for path in directory.iterdir():
        assert filecmp.cmp(path, tmp_path / "out" / path.name, shallow=False), path.name


def test_untouched_layers_keep_their_bytes(made, tmp_path):
    directory, specs, _ = made("llama", "4bit", targets=["q_proj"], layers=1)
    fuse(str(directory), specs, tmp_path / "out")
    before = tiny.tensors(directory / "model.safetensors")
    after = tiny.tensors(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before.keys() | after.keys() if not mx.array_equal(before[name], after[name])}
    assert changed <= {f"model.layers.1.self_attn.q_proj.{part}" for part in ("weight", "scales", "biases")}
    assert changed


MLA = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}


@pytest.mark.parametrize(
    ("mode", "kind", "forced"),
    [
        ("4bit", "lora", {}),
        ("mxfp8", "dora", {}),
        ("4bit", "lora", {"bits": 6}),
        ("8bit", "lora", {"dequantize": True}),
    ],
)
def test_the_split_projection_of_latent_attention(made, tmp_path, mode, kind, forced):
    directory, specs, expected = made(
        "deepseek_v3", mode, size=0.03, changes=MLA, type=kind, targets=["attention"], scales=(0.8, 0.5)
    )
    result = fuse(str(directory), specs, tmp_path / "out", max_kl=0.005, accept_loss=bool(forced), **forced)
    assert result.kl <= 0.005 or forced
    network, config = mlx_lm.load_model(tmp_path / "out")
    assert network.layers[0].self_attn.unembed_out["weight"].dtype == mx.uint32 or "dequantize" in forced
    got = network(TOKENS).astype(mx.float32)
    assert float(mx.abs(mx.softmax(got, -1) - mx.softmax(expected, -1)).max()) < 0.05
    if "dequantize" in forced:
        assert "quantization" not in config
        assert not any("scales" in name for name in flat(network.parameters()))
        assert float(mx.abs(got - expected).max()) < 1e-3


class TestForced:
    def test_bits(self, made, tmp_path):
        directory, specs, _ = made("llama", "3bit", size=0.03)
        fuse(str(directory), specs, tmp_path / "out", bits=8)
        network, _ = mlx_lm.load_model(tmp_path / "out")
        assert network.layers[0].mlp.up_proj.bits == 8
        assert network.lm_head.bits == 3

    def test_over_the_bound_it_fails_and_writes_nothing(self, made, tmp_path):
        directory, specs, _ = made("llama", "3bit", size=0.1)
        with pytest.raises(MlxLoraError, match="accept_loss") as caught:
            fuse(str(directory), specs, tmp_path / "out", bits=2, max_kl=1e-4)
        assert caught.value.exit_code == 1
        assert not (tmp_path / "out").exists()
        result = fuse(str(directory), specs, tmp_path / "out", bits=2, max_kl=1e-4, accept_loss=True)
        assert result.kl > 1e-4
        assert "as accepted" in str(result)

    @pytest.mark.parametrize("mode", ["4bit", "mxfp4"])
    def test_dequantize(self, made, tmp_path, mode):
        directory, specs, expected = made("qwen3", mode)
        result = fuse(str(directory), specs, tmp_path / "out", dequantize=True)
        network, config = mlx_lm.load_model(tmp_path / "out")
        assert "quantization" not in config
        assert not any("scales" in name for name in flat(network.parameters()))
        assert result.kl < 1e-4
        assert float(mx.abs(network(TOKENS) - expected).max()) < 2e-2

    def test_contradictions(self, made, tmp_path):
        directory, specs, _ = made("llama")
        for wrong in ({"bits": 4}, {"bits": 4, "dequantize": True}, {"max_kl": -1.0}):
            with pytest.raises(ConfigError):
                fuse(str(directory), specs, tmp_path / "out", **wrong)


def test_refusals(made, tmp_path):
    directory, specs, _ = made("llama")
    for target in (directory, directory / "inside"):
        with pytest.raises(InputError, match="model itself"):
            fuse(str(directory), specs, target)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    with pytest.raises(InputError, match="exists"):
        fuse(str(directory), specs, tmp_path / "there")
    other = tiny.model_directory(tmp_path / "other", "llama", seed=9)
    with pytest.raises(AdapterError, match="was made for tiny"):
        fuse(str(other), specs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fuse(str(other), specs, tmp_path / "out", any_base=True)


def test_the_probe(made, tmp_path):
    directory, specs, _ = made("llama", "4bit")
    assert fuse(str(directory), specs, tmp_path / "1", accept_loss=True).probe.startswith("built-in text")
    rows = "".join(
        json.dumps({"text": f"Question {i}: how much is {i} and {i}? It is {2 * i}."}) + "\n" for i in range(40)
    )
    (tmp_path / "rows.jsonl").write_text(rows)
    result = fuse(str(directory), specs, tmp_path / "2", probe=tmp_path / "rows.jsonl", accept_loss=True)
    assert result.probe == str(tmp_path / "rows.jsonl")
    run = tmp_path / "run"
    (tmp_path / "adapter-0").rename(tmp_path / "adapter")
    run.mkdir()
    (tmp_path / "adapter").rename(run / "adapter")
    config = {"data": [str(tmp_path / "rows.jsonl")], "samples": {"validation_split": 0.5}, "training": {"seed": 1}}
    (run / "config.yaml").write_text(json.dumps(config))
    result = fuse(str(directory), [str(run)], tmp_path / "3", accept_loss=True)
    assert result.probe == f"validation rows of {run}"
    assert result.difference.tokens > 100
    (tmp_path / "rows.jsonl").unlink()
    assert "cannot be read" in fuse(str(directory), [str(run)], tmp_path / "4", accept_loss=True).probe
