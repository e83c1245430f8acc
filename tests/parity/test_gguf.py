"""GGUF files held against llama.cpp: every family at float32, every number format, every rope scaling."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora.model import load_network
from mlxlora_convert.gguf_file import export_gguf
from mlxlora_convert.gguf_import import import_gguf
from mlxlora_convert.llamacpp import LlamaCpp, ReaderError
from mlxlora_convert.probe import log_probs
from tests import tiny
from tests.parity import gelu_table

pytestmark = pytest.mark.parity
pytest.importorskip("xllamacpp", reason="pip install xllamacpp")

TOKENS = [(37 * i + 11) % tiny.VOCABULARY for i in range(20)]
# llama.cpp's CPU code looks GELU up in a table of float16 values, see gelu_table.py. What that changes is in
# proportion to the logits; 2e-3 bound the largest difference of all tokens at logits of standard deviation 0.5.
EXACT, TABLE = 1e-5, 2e-3
SMOLLM3 = {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1], "no_rope_layer_interval": 4}
LINEAR = {"rope_type": "linear", "type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope", "type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 7.0], "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA = {"hidden_size": 64}  # whose root is exact in bfloat16, in which MLX's Gemma 3 rounds it
# family, changes to the tiny configuration, bound
CASES: list[tuple[str, dict[str, Any], float]] = [
    ("llama", {}, EXACT),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, EXACT),
    ("llama", {"head_dim": 16}, EXACT),
    ("llama", {"rope_scaling": LINEAR}, EXACT),
    ("llama", {"rope_scaling": LLAMA3, "head_dim": 32}, EXACT),
    ("llama", {"rope_scaling": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0}, "head_dim": 32}, EXACT),
    ("llama", {"rope_scaling": {**YARN, "mscale": 0.5, "mscale_all_dim": 0.25}, "head_dim": 32}, EXACT),
    ("llama", {"rope_scaling": LONGROPE}, EXACT),
    ("mistral", {}, EXACT),
    ("mixtral", {}, EXACT),
    ("qwen2", {}, EXACT),
    ("qwen2_moe", {}, EXACT),
    ("qwen3", {}, EXACT),
    ("qwen3", {"rope_scaling": YARN}, EXACT),
    ("qwen3_moe", {}, EXACT),
    ("olmo2", {}, EXACT),
    ("granite", {}, EXACT),
    ("granite", {"rope_scaling": LONGROPE}, EXACT),
    ("cohere", {}, EXACT),
    ("cohere", {"use_qk_norm": True, "num_hidden_layers": 64}, EXACT),
    ("smollm3", SMOLLM3, EXACT),
    ("stablelm", {}, EXACT),
    ("stablelm", {"use_qkv_bias": True, "qk_layernorm": True, "use_parallel_residual": True}, EXACT),
    ("phi3", {}, EXACT),
    ("gemma2", GEMMA, TABLE),
    ("gemma2", {**GEMMA, "query_pre_attn_scalar": 20}, TABLE),
    ("gemma3_text", GEMMA, TABLE),
    ("gemma3_text", {**GEMMA, "query_pre_attn_scalar": 20, "num_hidden_layers": 4, "sliding_window_pattern": 3}, TABLE),
    ("gemma3_text", {**GEMMA, "rope_scaling": {**LINEAR, "factor": 8.0}}, TABLE),
    ("starcoder2", {}, TABLE),
]


def judged(file: Path) -> Any:
    """What llama.cpp says of TOKENS."""
    with LlamaCpp(file, threads=1) as reader:
        return reader.log_probs(TOKENS, tiny.VOCABULARY)


def differences(directory: Path, file: Path) -> Any:
    return np.abs(log_probs(load_network(directory)[0], TOKENS) - judged(file))


@pytest.mark.parametrize(("family", "changes", "bound"), CASES, ids=[f"{c[0]}-{'-'.join(c[1])}" for c in CASES])
def test_every_family_at_float32_out_and_in(tmp_path: Path, family: str, changes: dict[str, Any], bound: float) -> None:
    directory = tiny.model_directory(tmp_path / "model", family, **changes)
    if bound == TABLE:
        tiny.with_logits(directory, 0.5)
    written = export_gguf(directory, tmp_path / "model.gguf", type="f32")
    import_gguf(written.path, tmp_path / "after")
    theirs = judged(written.path)
    for ours in (directory, tmp_path / "after"):
        assert np.abs(log_probs(load_network(ours)[0], TOKENS) - theirs).max() < bound


GELUS = [(family, changes, 1.0) for family, changes, bound in CASES if bound == TABLE]
GELUS += [
    (family, GEMMA if "gemma" in family else {}, logits) for family in gelu_table.FAMILIES for logits in (0.5, 4.0)
]


@pytest.mark.parametrize(("family", "changes", "logits"), GELUS)
def test_the_gelu_table_is_the_only_difference(
    tmp_path: Path, family: str, changes: dict[str, Any], logits: float
) -> None:
    directory = tiny.model_directory(tmp_path / "model", family, intermediate_size=16, **changes)
    written = export_gguf(tiny.with_logits(directory, logits), tmp_path / "model.gguf", type="f32")
    with LlamaCpp(written.path, threads=1) as reader:
        apart = gelu_table.apart(family, load_network(directory)[0], reader)
    larger = max(1.0, logits)  # float32 itself rounds larger numbers by more
    assert np.quantile(apart, 0.75) < EXACT * larger
    assert max(apart) < TABLE * larger  # a step of the table, here and there


@pytest.mark.parametrize(
    ("kind", "bound"),
    [
        ("f16", 0.03), ("bf16", 0.2), ("q8_0", 0.4), ("q5_0", 2.0), ("q5_1", 2.0),
        ("q4_0", 4.0), ("q4_1", 4.0), ("mxfp4", 4.0),
    ],
)  # fmt: skip
def test_every_type_is_read(tmp_path: Path, kind: Any, bound: float) -> None:
    directory = tiny.model_directory(tmp_path / "model", "llama")
    written = export_gguf(directory, tmp_path / "model.gguf", type=kind)
    found = differences(directory, written.path)
    assert found.max() < bound and found.mean() < bound / 4


@pytest.mark.parametrize(
    ("quantize", "kind"),
    [
        ({"bits": 4, "group_size": 32}, "q4_1"),
        ({"bits": 4, "group_size": 64}, "q4_1"),
        ({"bits": 5, "group_size": 32}, "q5_1"),
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mxfp4"),
    ],
)
def test_the_same_quantization_is_kept(tmp_path: Path, quantize: dict[str, Any], kind: Any) -> None:
    directory = tiny.model_directory(
        tmp_path / "model", "llama", quantize, dtype=mx.float16, hidden_size=64, intermediate_size=128
    )
    written = export_gguf(directory, tmp_path / "model.gguf", type=kind)
    assert written.kept == 16
    # what is left is llama.cpp's rounding of activations to 8 bits
    assert differences(directory, written.path).mean() < 0.1


@pytest.mark.parametrize(
    "quantize", [{"bits": 3}, {"bits": 8}, {"bits": 8, "mode": "mxfp8"}, {"bits": 4, "mode": "nvfp4", "group_size": 16}]
)
def test_other_quantizations_are_dequantized(tmp_path: Path, quantize: dict[str, Any]) -> None:
    directory = tiny.model_directory(tmp_path / "model", "qwen3", quantize)
    written = export_gguf(directory, tmp_path / "model.gguf", type="f32")
    assert written.kept == 0 and differences(directory, written.path).max() < 1e-4


def test_llama_cpp_refusing_or_crashing_is_an_error(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    directory = tiny.model_directory(tmp_path / "model", "llama")
    good = export_gguf(directory, tmp_path / "good.gguf", type="f32").path.read_bytes()
    broken.write_bytes(good[: len(good) // 2])
    with pytest.raises(ReaderError, match=r"llama.cpp refused the file"):
        LlamaCpp(broken)


def test_the_template_renders_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = tiny.model_directory(tmp_path / "model", "llama")
    written = export_gguf(directory, tmp_path / "model.gguf", type="f32")
    messages = [
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": "Grüße! 你好 {{ name }}"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "  spaces \n"},
    ]
    expected = AutoTokenizer.from_pretrained(directory).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    with LlamaCpp(written.path) as reader:
        assert reader.render({"messages": messages}) == expected


def test_the_door_checks_before_it_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlxlora.errors import MlxLoraError
    from mlxlora_convert import gguf_tensors
    from mlxlora_convert.export import export

    directory = tiny.model_directory(tmp_path / "model", "llama")
    done = export(str(directory), "gguf", tmp_path / "model.gguf")
    assert "read back by llama.cpp, 64 tokens, max |Δ logprob|" in str(done) and (tmp_path / "model.gguf").is_file()
    monkeypatch.setattr(gguf_tensors, "rotary_order", lambda head, backwards: np.arange(head))
    with pytest.raises(MlxLoraError, match="not the same model"):
        export(str(directory), "gguf", tmp_path / "wrong.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.gguf"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlxlora.cli import main

    directory = tiny.model_directory(tmp_path / "model", "qwen3")
    words = ["export", "--model", str(directory), "--to", "gguf", "--out", str(tmp_path / "m.gguf"), "--json"]
    assert main([*words, "--gguf.type", "q8_0"]) == 0
    assert json.loads(capsys.readouterr().out)["check"]["reader"] == "llama.cpp"
    assert main([*words, "--gguf.type", "q9"]) == 2
