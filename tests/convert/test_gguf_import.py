"""A model through GGUF and back: the same weights bit for bit, the same configuration in effect, the same tokens."""

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.errors import ConfigError, FormatError, UnsupportedError
from mlxlora.model import load, load_network
from mlxlora.parameters import flat
from mlxlora_convert.export import import_
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.gguf_header import read_header
from mlxlora_convert.gguf_import import import_gguf
from mlxlora_convert.probe import log_probs
from tests import tiny

TOKENS = [(37 * i + 11) % tiny.VOCABULARY for i in range(24)]
LLAMA3 = {
    "rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", {"rope_scaling": LLAMA3, "head_dim": 32}),
    ("llama", {"rope_scaling": LINEAR}),
    ("llama", {"rope_scaling": {**YARN, "mscale": 0.5}}),
    ("mistral", {}),
    ("mixtral", {}),
    ("qwen2", {}),
    ("qwen2_moe", {}),
    ("qwen3", {"rope_scaling": YARN}),
    ("qwen3_moe", {}),
    ("gemma2", {}),
    ("gemma3_text", {}),
    ("phi3", {}),
    ("olmo2", {}),
    ("granite", {}),
    ("cohere", {}),
    ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "no_rope_layer_interval": 4}),
    ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}),
    ("stablelm", {}),
    ("starcoder2", {}),
]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=[f"{c[0]}-{'-'.join(c[1])}" for c in CASES])
def test_there_and_back(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    before = tiny.model_directory(tmp_path / "before", family, **changes)
    file = export_gguf(before, tmp_path / "model.gguf", type="f32").path
    done = import_gguf(file, tmp_path / "after")
    assert done.dtype == "float32" and done.kept == 0
    old, _ = load_network(before)
    new, _ = load_network(tmp_path / "after")
    weights: dict[str, Any] = flat(new.parameters())
    for name, value in flat(old.parameters()).items():
        # gemma keeps its norms minus one: adding and taking away one rounds
        close = (
            np.allclose(value, weights[name], atol=2e-7, rtol=0)
            if "norm" in name
            else mx.array_equal(value, weights[name])
        )
        assert close, name
    np.testing.assert_allclose(log_probs(old, TOKENS), log_probs(new, TOKENS), atol=2e-5)


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4"])
def test_a_quantization_that_mlx_has_is_kept_bit_for_bit(tmp_path: Path, kind: Any) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
    before = tiny.model_directory(tmp_path / "before", "llama", dtype=mx.float16, **sizes)
    first = export_gguf(before, tmp_path / "first.gguf", type=kind)
    done = import_gguf(first.path, tmp_path / "after")
    assert first.kept == 0 and done.kept == 16 and done.dtype == "float16"
    again = export_gguf(tmp_path / "after", tmp_path / "again.gguf", type=kind)
    assert again.kept == 16 and tensors(first.path) == tensors(again.path)
    plain = import_gguf(first.path, tmp_path / "plain", dequantize=True, dtype="float32")
    assert plain.kept == 0
    kept, _ = load_network(tmp_path / "after")
    numbers, _ = load_network(tmp_path / "plain")
    assert np.abs(log_probs(kept, TOKENS) - log_probs(numbers, TOKENS)).max() < 2e-3


def tensors(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    found = read_header(path).tensors.values()
    return {one.name: hashlib.sha256(data[one.offset : one.offset + one.nbytes]).hexdigest() for one in found}


def test_the_tokenizer_and_its_template_come_along(tmp_path: Path) -> None:
    before = tiny.model_directory(tmp_path / "before", "llama")
    import_gguf(export_gguf(before, tmp_path / "m.gguf").path, tmp_path / "after")
    old, new = load(before).tokenizer, load(tmp_path / "after").tokenizer
    assert new.chat_template == old.chat_template and new.eos_id == old.eos_id
    for text in ("Hello world", "  Grüße\n\n", "<|im_start|>user", "1234 x", "你好 🎉"):
        assert list(new.hf.encode(text)) == list(old.hf.encode(text))
        assert new.hf.decode(new.hf.encode(text)) == old.hf.decode(old.hf.encode(text))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_dtype(tmp_path: Path, dtype: Any) -> None:
    before = tiny.model_directory(tmp_path / "before", "qwen3")
    file = export_gguf(before, tmp_path / "model.gguf", type="f32").path
    import_gguf(file, tmp_path / "after", dtype=dtype)
    old, _ = load_network(before)
    new, _ = load_network(tmp_path / "after")
    weights: dict[str, Any] = flat(new.parameters())
    for name, value in flat(old.parameters()).items():
        assert mx.array_equal(value.astype(getattr(mx, dtype)), weights[name]), name


def test_several_files_when_the_model_is_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxlora_convert import gguf_import, safetensors_write

    before = tiny.model_directory(tmp_path / "before", "llama")
    file = export_gguf(before, tmp_path / "model.gguf", type="f32").path
    monkeypatch.setattr(
        gguf_import,
        "write_shards",
        lambda *given, **named: safetensors_write.write_shards(*given, **{**named, "shard_bytes": 60_000}),
    )
    import_gguf(file, tmp_path / "after")
    assert len(list((tmp_path / "after").glob("model-*.safetensors"))) > 2
    assert np.array_equal(
        log_probs(load_network(before)[0], TOKENS), log_probs(load_network(tmp_path / "after")[0], TOKENS)
    )


def rewritten(tmp_path: Path, change: Any, family: str = "llama") -> Path:
    """A good file with `change(metadata, tensors)` applied to what it says."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    before = tiny.model_directory(tmp_path / "before", family)
    good = export_gguf(before, tmp_path / "good.gguf", type="f32").path
    reader = GGUFReader(good)
    keys = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    values: dict[str, Any] = {name: field.contents() for name, field in keys.items()}
    data = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change(values, data)
    writer = GGUFWriter(tmp_path / "changed.gguf", str(values["general.architecture"]))
    for name, value in values.items():
        kind = keys[name].types[0] if name in keys else GGUFValueType.get_type(value)
        if kind == GGUFValueType.ARRAY:
            writer.add_array(name, value)
        elif name != "general.architecture":
            writer.add_key_value(name, value, kind)
    for name, array in data.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "changed.gguf"


WRONG: dict[str, tuple[Any, str]] = {
    "a tensor is missing": (lambda m, t: t.pop("blk.1.ffn_up.weight"), r"blk.1.ffn_up.weight: missing, expected shape"),
    "a tensor too many": (lambda m, t: t.update({"blk.0.extra.weight": t["output_norm.weight"]}), "blk.0.extra.weight"),
    "a shape": (
        lambda m, t: t.update({"blk.0.ffn_down.weight": np.zeros((32, 32), np.float32)}),
        r"blk.0.ffn_down.weight: shape \[32, 32\], expected \[32, 64\]",
    ),
    "blocks counted wrong": (lambda m, t: m.update({"llama.block_count": 3}), "llama.block_count: says 3"),
    "a huge number of blocks": (lambda m, t: m.update({"llama.block_count": 2**31 - 1}), "llama.block_count"),
    "no width": (lambda m, t: m.pop("llama.embedding_length"), "llama.embedding_length: missing"),
    "another width": (lambda m, t: m.update({"llama.embedding_length": 2**30}), "token_embd.weight|possible network"),
    "heads that do not divide": (
        lambda m, t: m.update({"llama.attention.head_count_kv": 3}),
        r"attn_k.weight: shape \[16, 32\], expected \[24, 32\]",
    ),
    "heads of odd width": (
        lambda m, t: m.update({"llama.attention.key_length": 7, "llama.rope.dimension_count": 7}), "heads are 7 wide"
    ),
    "no heads": (lambda m, t: m.update({"llama.attention.head_count": 0}), "head_count"),
    "an eps that is not a number": (
        lambda m, t: m.update({"llama.attention.layer_norm_rms_epsilon": float("nan")}), "rms_epsilon",
    ),
    "tokens of another number": (lambda m, t: m["tokenizer.ggml.token_type"].pop(), "token_type: not 512 numbers"),
    "a token twice": (lambda m, t: m["tokenizer.ggml.tokens"].__setitem__(7, m["tokenizer.ggml.tokens"][6]), "twice"),
    "a merge of nothing": (lambda m, t: m["tokenizer.ggml.merges"].append("qq zz"), "no pair of tokens"),
    "an end of text outside": (lambda m, t: m.update({"tokenizer.ggml.eos_token_id": 100_000}), "expected an id below"),
    "rope factors of nobody": (
        lambda m, t: t.update({"rope_freqs.weight": np.array([1, 9, 2, 5], np.float32)}), "are not Llama 3's",
    ),
    "rope scaling unknown": (lambda m, t: m.update({"llama.rope.scaling.type": "spiral"}), "'spiral'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_does_not_fit_is_refused_and_nothing_written(tmp_path: Path, name: str) -> None:
    change, expected = WRONG[name]
    file = rewritten(tmp_path, change)
    with pytest.raises(FormatError, match=expected):
        import_gguf(file, tmp_path / "after")
    assert not list(tmp_path.glob("*after*"))


def test_the_file_of_a_directory(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    (tmp_path / "made").mkdir()
    export_gguf(directory, tmp_path / "made" / "model.gguf", type="q8_0")
    (tmp_path / "made" / "Modelfile").write_text("FROM ./model.gguf\n")
    with pytest.raises(ConfigError, match="leave out --model"):
        import_(tmp_path / "made", tmp_path / "out", model=str(directory))
    assert import_(tmp_path / "made", tmp_path / "out").format == "gguf"
    (tmp_path / "made" / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"holds model.gguf, other.gguf\. Name one"):
        import_(tmp_path / "made", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_cannot_be_read_yet_is_named(tmp_path: Path) -> None:
    def other(metadata: dict[str, Any], _: Any) -> None:
        metadata["general.architecture"] = "rwkv9"

    with pytest.raises(UnsupportedError, match=r"'rwkv9' cannot be read yet. Known: .*llama"):
        import_gguf(rewritten(tmp_path, other), tmp_path / "after")
    (tmp_path / "good.gguf").unlink()

    def wordpiece(metadata: dict[str, Any], _: Any) -> None:
        metadata["tokenizer.ggml.model"] = "bert"

    with pytest.raises(UnsupportedError, match="'bert' cannot be rebuilt"):
        import_gguf(rewritten(tmp_path, wordpiece), tmp_path / "after")


def test_number_formats_that_cannot_be_read_are_named_before_anything_is_written(tmp_path: Path) -> None:
    def integers(_: Any, tensors: dict[str, Any]) -> None:
        for name in ("blk.0.ffn_down.weight", "blk.1.ffn_up.weight"):
            tensors[name] = np.ones(tensors[name].shape, np.int16)

    with pytest.raises(UnsupportedError, match=r"i16 \(2 tensors, such as blk\.0\.ffn_down\.weight\)"):
        import_gguf(rewritten(tmp_path, integers), tmp_path / "after")
    assert not list(tmp_path.glob("*after*"))


def test_config_json_has_both_rope_spellings(tmp_path: Path) -> None:
    before = tiny.model_directory(tmp_path / "before", "llama", rope_scaling=LINEAR)
    import_gguf(export_gguf(before, tmp_path / "m.gguf").path, tmp_path / "after")
    config = json.loads((tmp_path / "after" / "config.json").read_text())
    assert config["rope_scaling"]["factor"] == 4.0 and config["rope_parameters"]["rope_type"] == "linear"
    assert config["torch_dtype"] == "float16" and config["architectures"] == ["LlamaForCausalLM"]
