"""Converted models are the models they were made from, in every form, and nothing half done is left behind."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora import architecture, hub, mlxlm, model, weights
from mlxlora.convert import convert
from mlxlora.errors import ConfigError, InputError, ModelError, UnsupportedError
from mlxlora.parameters import flat
from mlxlora.quantize import QuantizeConfig
from tests import tiny

TOKENS = mx.array([[1, 70, 300, 5, 9, 41, 7]])


def logits(directory: Path) -> mx.array:
    return model.load_network(directory)[0](TOKENS)


def test_plain_conversion_is_exact_and_loads_in_mlx_lm(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "qwen3")
    result = convert(str(source), tmp_path / "out", check=False)
    assert mx.array_equal(logits(source), logits(tmp_path / "out"))
    assert result.dtype == "float32" and result.bits_per_weight == pytest.approx(32)
    network, tokenizer = mlxlm.module("utils").load(str(tmp_path / "out"))
    assert mx.array_equal(network(TOKENS), logits(source))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert tokenizer.encode("the capital")


def test_dtype_is_changed_and_said(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "llama")
    result = convert(str(source), tmp_path / "out", dtype="bfloat16")
    tensors = flat(model.load_network(tmp_path / "out")[0].parameters())
    assert {tensor.dtype for tensor in tensors.values()} == {mx.bfloat16}
    config = architecture.read_config(tmp_path / "out")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert result.difference is not None and 0 < result.difference.kl < 1e-3


@pytest.mark.parametrize(
    ("wanted", "kl"),
    [
        (QuantizeConfig(bits=8, group_size=32), 1e-3),
        (QuantizeConfig(bits=4, group_size=32), 0.1),
        (QuantizeConfig(bits=3, group_size=32), 1.0),
        (QuantizeConfig(mode="mxfp4"), 0.5),
        (QuantizeConfig(mode="mxfp8"), 0.05),
        (QuantizeConfig(mode="nvfp4"), 0.5),
    ],
)
def test_quantized_models_say_how_far_they_are(tmp_path: Path, wanted: QuantizeConfig, kl: float) -> None:
    source = tiny.model_directory(tmp_path / "source", "llama")
    result = convert(str(source), tmp_path / "out", quantize=wanted)
    assert result.difference is not None and 0 < result.difference.kl < kl
    assert result.bits_per_weight < 32 and result.quantization == str(wanted)
    theirs, _ = mlxlm.module("utils").load_model(tmp_path / "out")
    assert mx.array_equal(theirs(TOKENS), logits(tmp_path / "out"))


def test_quantization_equals_mlx_lms_own(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "mixtral")
    convert(str(source), tmp_path / "ours", quantize=QuantizeConfig(bits=4, group_size=32), check=False)
    mlxlm.module("convert").convert(str(source), str(tmp_path / "theirs"), quantize=True, q_group_size=32, q_bits=4)
    assert mx.array_equal(logits(tmp_path / "ours"), logits(tmp_path / "theirs"))


def test_mixed_recipe(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "llama")
    convert(str(source), tmp_path / "out", quantize=QuantizeConfig(recipe="mixed_3_6", group_size=32))
    quantization = architecture.read_config(tmp_path / "out")["quantization"]
    assert {entry["bits"] for entry in quantization.values() if isinstance(entry, dict)} == {3, 6}
    assert quantization["lm_head"]["bits"] == 6


def test_there_and_back(tmp_path: Path) -> None:
    source = tiny.model_directory(
        tmp_path / "source", "deepseek_v3", kv_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32
    )
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    convert(str(source), packed, quantize=QuantizeConfig(bits=4, group_size=32))
    result = convert(str(packed), plain, dequantize=True)
    assert "quantization" not in architecture.read_config(plain)
    assert result.difference is not None and result.difference.kl < 1e-6
    with pytest.raises(UnsupportedError, match="not quantized"):
        convert(str(plain), tmp_path / "again", dequantize=True)
    with pytest.raises(UnsupportedError, match="quantized already"):
        convert(str(packed), tmp_path / "again", quantize=QuantizeConfig(bits=8))
    assert not (tmp_path / "again").exists()


def test_layers_that_cannot_be_quantized_are_listed(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "llama", intermediate_size=80)
    result = convert(str(source), tmp_path / "out", quantize=QuantizeConfig(bits=4, group_size=32), check=False)
    assert {one.path for one in result.kept} == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert "80" in result.kept[0].reason and "down_proj" in str(result)
    with pytest.raises(UnsupportedError, match="No layer"):
        convert(str(source), tmp_path / "none", quantize=QuantizeConfig(bits=4, group_size=128))
    assert not (tmp_path / "none").exists()


def test_rope_is_written_in_both_spellings(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    del config["rope_theta"]
    config["rope_parameters"] = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    (source / "config.json").write_text(json.dumps(config))
    convert(str(source), tmp_path / "out", check=False)
    written = architecture.read_config(tmp_path / "out")
    assert written["rope_theta"] == 5e5 and written["rope_scaling"]["type"] == "linear"
    assert written["rope_parameters"]["factor"] == 4.0
    theirs, _ = mlxlm.module("utils").load_model(tmp_path / "out")
    assert mx.array_equal(theirs(TOKENS), logits(source))


def test_windows_that_mlx_lm_ignores_are_said(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "gemma2", sliding_window=256)
    result = convert(str(source), tmp_path / "out", check=False)
    assert "window of 256" in result.warnings[0] and "Warning" in str(result)


def test_a_sentencepiece_folder_gets_a_fast_tokenizer(tmp_path: Path) -> None:
    import sentencepiece

    source = tiny.model_directory(tmp_path / "source", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 9), vocab_size=300, model_type="bpe",
        model_prefix=str(source / "tokenizer"), byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False, hard_vocab_limit=False,
    )  # fmt: skip
    result = convert(str(source), tmp_path / "out")
    assert result.tokenizer is not None and result.tokenizer > 500
    reference = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    _, tokenizer = mlxlm.module("utils").load(str(tmp_path / "out"))
    assert tokenizer.encode("a lazy fox")[1:] == reference.encode("a lazy fox")


def test_existing_targets_and_contradictions_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(InputError, match="exists"):
        convert("no/such/model", tmp_path / "out")
    with pytest.raises(ConfigError, match="contradict"):
        convert("no/such/model", tmp_path / "new", quantize=QuantizeConfig(bits=4), dequantize=True)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "llama")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ModelError):
        convert(str(source), tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bits": 7}, "bits"),
        ({"bits": 4, "group_size": 48}, "group_size"),
        ({"mode": "mxfp4", "bits": 8}, "4 bits"),
        ({"mode": "mxfp4", "group_size": 64}, "group_size"),
        ({"mode": "int4"}, "mode"),
        ({"mode": "mxfp8", "recipe": "mixed_3_6"}, "recipe"),
        ({"bits": 4, "recipe": "mixed_3_6"}, "recipe"),
        ({"group_size": 32}, "bits"),
    ],
)
def test_wrong_quantizations_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        QuantizeConfig(**options)


def test_torch_files_without_torch_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    source = tiny.model_directory(tmp_path / "source", "llama")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="pip install torch"):
        convert(str(source), tmp_path / "out")
    with pytest.raises(ModelError, match="mlxlora convert"):
        model.load_network(source)


def test_a_model_passes_through_at_the_cost_of_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = 4 << 20
    whole = weights.write
    monkeypatch.setattr(weights, "write", lambda *given, **more: whole(*given, **{**more, "shard_bytes": shard}))
    sizes: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 1024, "num_hidden_layers": 12}
    source = tiny.model_directory(tmp_path / "source", "llama", **sizes)
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    for options in ({"dtype": "bfloat16"}, {"quantize": QuantizeConfig(bits=8)}, {}):
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        convert(str(source), tmp_path / str(len(options) + len(str(options))), check=False, **options)
        used = mx.get_peak_memory() - before
        assert used < 3 * shard < total, f"{options}: {used / 1e6:.1f} MB for a model of {total / 1e6:.1f} MB"


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.model_directory(tmp_path / "cache", "llama")
    asked = []

    def fetch(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return source

    monkeypatch.setattr(hub, "_fetch", fetch)
    result = convert("someone/tiny", tmp_path / "out", revision="v1", check=False)
    assert asked == [("someone/tiny", "v1")] and result.source == source
    assert mx.array_equal(logits(source), logits(tmp_path / "out"))
