"""What is written into a GGUF file: tables, number formats, a flat memory, and everything that is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.errors import ConfigError, InputError, MlxLoraError, ModelError, UnsupportedError
from mlxlora_convert import gguf_architectures as tables
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.gguf_header import read_header
from mlxlora_convert.gguf_read import float_tensor
from mlxlora_convert.gguf_tensors import CODED, decode_blocks, encode, ggml_type, keep_blocks
from mlxlora_convert.weight_rows import QuantizedWeight, model_weights, pack, unpack
from tests import tiny


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_mlx_packs_them(bits: int) -> None:
    weight = mx.random.normal((3, 96), key=mx.random.key(bits))
    packed, scales, biases = mx.quantize(weight, group_size=32, bits=bits)
    codes = unpack(np.array(packed), bits)
    plain = codes.reshape(3, -1, 32) * np.array(scales)[..., None] + np.array(biases)[..., None]
    expected = np.array(mx.dequantize(packed, scales, biases, group_size=32, bits=bits))
    np.testing.assert_allclose(plain.reshape(3, 96), expected, atol=1e-6)
    assert np.array_equal(pack(codes, bits), np.array(packed))


@pytest.mark.parametrize("kind", [*CODED, "mxfp4"])
def test_blocks_say_what_the_gguf_package_reads(kind: str) -> None:
    from gguf.quants import dequantize

    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    data = encode(values, kind, "x")
    blocks = decode_blocks(data, kind, 64)
    expected = dequantize(data, ggml_type(kind))
    if kind == "mxfp4":
        again = mx.dequantize(
            mx.array(pack(blocks.codes, 4)), mx.array(blocks.scales), group_size=32, bits=4, mode="mxfp4"
        )
        plain = np.array(again.astype(mx.float32))
    else:
        assert blocks.biases is not None
        plain = blocks.codes.reshape(4, -1, 32) * blocks.scales[..., None] + blocks.biases[..., None]
    np.testing.assert_allclose(plain.reshape(4, 64), expected, rtol=1e-6, atol=1e-7)
    kept = keep_blocks(blocks, kind)
    assert kept is not None and np.array_equal(kept, data)


@pytest.mark.parametrize(("family", "change"), [("llama", {}), ("qwen3_moe", {}), ("gemma2", {}), ("stablelm", {})])
def test_the_gguf_package_reads_what_is_written(tmp_path: Path, family: str, change: dict[str, Any]) -> None:
    from gguf import GGUFReader

    directory = tiny.model_directory(tmp_path / "model", family, **change)
    done = export_gguf(directory, tmp_path / "model.gguf", type="f32")
    reader = GGUFReader(done.path)
    header = read_header(done.path)
    for tensor in reader.tensors:
        ours = float_tensor(header, tensor.name)
        assert np.array_equal(ours, np.asarray(tensor.data).reshape(ours.shape)), tensor.name
    types = reader.fields["tokenizer.ggml.token_type"]
    assert types.types[1].name == "INT32"  # what llama.cpp insists on
    assert reader.fields["general.architecture"].contents() == header.architecture


def test_every_row_of_the_tables_names_a_model_of_mlx_lm_and_llama_cpp() -> None:
    from gguf.constants import MODEL_ARCH_NAMES

    from mlxlora.mlxlm import model_types

    names = [family.model_type for family in tables.FAMILIES]
    assert len(set(names)) == len(names) == 16
    for family in tables.FAMILIES:
        assert family.model_type in model_types() and family.gguf in MODEL_ARCH_NAMES.values()
        assert len({entry.mlx for entry in family.tensors}) == len({entry.gguf for entry in family.tensors})
        assert len({entry.mlx for entry in family.tensors}) == len(family.tensors)


REFUSED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "architecture": ("gpt2", {}, UnsupportedError, "type 'gpt2' cannot be written as GGUF"),
    "dynamic rope": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedError, "dynamic"),
    "rope that mlx leaves out": (
        "mixtral", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, UnsupportedError, "Possible there: none",
    ),
    "yarn's ramp": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 8}},
        UnsupportedError, "beta_fast: is 8, llama.cpp takes 32",
    ),
    "yarn without its context": (
        "llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, UnsupportedError, "missing",
    ),
    "experts not renormalised": ("qwen3_moe", {"norm_topk_prob": False}, UnsupportedError, "norm_topk_prob: is False"),
    "some blocks without experts": ("qwen3_moe", {"mlp_only_layers": [0]}, UnsupportedError, "mlp_only_layers"),
    "smollm3's rotation": ("smollm3", {}, UnsupportedError, "no_rope_layer"),
    "cohere's norms": ("cohere", {"use_qk_norm": True}, UnsupportedError, "use_qk_norm"),
    "a window": ("qwen2", {"use_sliding_window": True}, UnsupportedError, "use_sliding_window"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_said_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    family, changes, kind, expected = REFUSED[name]
    directory = tiny.model_directory(tmp_path / "model", family)
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(kind, match=expected):
        export_gguf(directory, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel"])
def test_another_kind_of_vocabulary_is_refused_with_other_ways_out(tmp_path: Path, kind: str) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    state = json.loads((directory / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    pieces = [[text, -1.0] for text in sorted(vocab, key=vocab.__getitem__)]
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": pieces}
    words = {"type": "WordLevel", "vocab": vocab, "unk_token": tiny.SPECIAL[0]}
    state["model"] = unigram if kind == "Unigram" else words
    (directory / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UnsupportedError, match=rf"of type {kind}.*only BPE .*--to hf"):
        export_gguf(directory, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def rewrite(directory: Path, change: Any) -> None:
    path = directory / "model.safetensors"
    tensors = tiny.tensors(path)
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors, metadata={"format": "mlx"})


def poison(tensors: dict[str, mx.array]) -> None:
    tensors["model.norm.weight"] = mx.array([float("nan")] * 32)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), ModelError, r"layers\.1\.mlp\.up_proj\.weight"),
    "extra": (lambda t: t.update(extra=mx.zeros((2,))), ModelError, "extra: in the weight files"),
    "shape": (
        lambda t: t.update({"model.norm.weight": mx.zeros((31,))}), ModelError,
        r"model\.norm\.weight: has shape \[31\], the network needs \[32\]",
    ),
    "not finite": (poison, ModelError, "output_norm.weight: in rows 0 to 0"),
    "too large for float16": (
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"] * 1e6}), ModelError,
        "output.weight: .* Export as bf16",
    ),
    "integers": (
        lambda t: t.update({"model.norm.weight": mx.zeros((32,), mx.int32)}), ModelError, "holds int32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_named_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    change, kind, expected = WRONG[name]
    directory = tiny.model_directory(tmp_path / "model", "llama")
    rewrite(directory, change)
    with pytest.raises(kind, match=expected):
        export_gguf(directory, tmp_path / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_truncated_weights(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    data = (directory / "model.safetensors").read_bytes()
    for length in (0, 4, 100, len(data) // 2, len(data) - 1):
        (directory / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(MlxLoraError) as raised:
            export_gguf(directory, tmp_path / "out.gguf")
        assert raised.value.exit_code == 2
    assert not (tmp_path / "out.gguf").exists()


def test_ids_beyond_the_embeddings(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama", vocab_size=500)
    with pytest.raises(ModelError, match="beyond the model's 500 rows"):
        export_gguf(directory, tmp_path / "out.gguf")


def test_rows_that_fill_no_block_stay_float16(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama", intermediate_size=72)
    done = export_gguf(directory, tmp_path / "out.gguf", type="q8_0")
    assert "blk.0.ffn_down.weight" in done.notes[0]
    kinds = {name: info.type for name, info in read_header(done.path).tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == ggml_type("f16") and kinds["blk.0.ffn_up.weight"] == ggml_type("q8_0")


@pytest.mark.parametrize(("kind", "head"), [("q4_0", "q8_0"), ("q5_1", "q8_0"), ("q8_0", "q8_0"), ("bf16", "bf16")])
def test_the_head_keeps_eight_bits(tmp_path: Path, kind: Any, head: str) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    tensors = read_header(export_gguf(directory, tmp_path / "out.gguf", type=kind).path).tensors
    assert tensors["output.weight"].type == ggml_type(head) and tensors["blk.0.attn_q.weight"].type == ggml_type(kind)
    assert tensors["output_norm.weight"].type == ggml_type("f32")


def test_an_existing_file_and_an_unknown_type_are_refused(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export_gguf(directory, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_text() == "mine"
    with pytest.raises(ConfigError, match=r"Did you mean 'q4_"):
        export_gguf(directory, tmp_path / "other.gguf", type="q4_O")  # type: ignore[arg-type]


def test_the_end_of_a_turn_is_found_in_the_template(tmp_path: Path) -> None:
    gemma = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>\n{% endfor %}"
    directory = tiny.model_directory(tmp_path / "model", "llama", template=gemma)
    metadata = read_header(export_gguf(directory, tmp_path / "out.gguf").path).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    assert tokens[metadata["tokenizer.ggml.eot_token_id"]] == "<|endoftext|>"
    assert tokens[metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"


def test_a_quantized_weight_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama", {"bits": 4, "group_size": 32})
    weight = model_weights(directory, json.loads((directory / "config.json").read_text()))["lm_head.weight"]
    assert isinstance(weight, QuantizedWeight) and weight.shape == (512, 32)
    whole = weight.floats(0, 512)
    assert np.array_equal(np.concatenate([weight.floats(n, n + 64) for n in range(0, 512, 64)]), whole)


PEAK = """
import resource, sys
from pathlib import Path
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.gguf_import import import_gguf
small, large, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
def peak():  # getrusage on Linux begins with what the parent process had
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
export_gguf(small, small.parent / f"small-{kind}.gguf", type=kind)
import_gguf(small.parent / f"small-{kind}.gguf", small.parent / f"small-{kind}")
before = peak()
export_gguf(large, large.parent / f"large-{kind}.gguf", type=kind)
import_gguf(large.parent / f"large-{kind}.gguf", large.parent / f"large-{kind}")
print(peak() - before)
"""


def test_peak_memory_is_far_below_the_size_of_the_model(tmp_path: Path) -> None:
    small = tiny.model_directory(tmp_path / "small", "llama")
    large = tiny.model_directory(
        tmp_path / "large", "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, dtype=mx.float16
    )
    size = (large / "model.safetensors").stat().st_size
    assert size > 65e6
    # both ways, after a small model has warmed the imports up
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(small), str(large), "q8_0"], capture_output=True, text=True, check=True
    )
    assert 0 < int(run.stdout) < size / 2, run.stdout
