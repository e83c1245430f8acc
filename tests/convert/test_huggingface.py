"""Models leave in the layout of a Hugging Face checkpoint, or not at all."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxlora import model, weights
from mlxlora.adapters import Adapters
from mlxlora.errors import ConfigError, InputError, UnsupportedError
from mlxlora.parameters import flat
from mlxlora_convert import checkpoint_layout, checkpoint_rules
from mlxlora_convert.export import export
from mlxlora_convert.hf_options import HuggingFaceOptions
from tests import tiny

TOKENS = mx.array([[1, 70, 300, 5, 9, 41, 7]])
KNOWN = sorted(set(tiny.FAMILIES) & set(checkpoint_layout.FAMILIES))

OTHER_NAMES = ("joyai_llm_flash", "kimi_k2")


def logits(directory: Path) -> mx.array:
    return model.load_network(directory)[0](TOKENS)


@pytest.mark.parametrize("family", KNOWN)
def test_out_and_back_is_the_same_model(tmp_path: Path, family: str) -> None:
    source = tiny.model_directory(tmp_path / "source", family)
    result = export(str(source), "hf", tmp_path / "out", check=False)
    assert any("KL 0 nats" in note for note in result.notes), result.notes
    before, after = (flat(model.load_network(path)[0].parameters()) for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(mx.array_equal(before[name], after[name]) for name in before)
    same = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in same[family in checkpoint_layout.ANEW :]:
        assert (source / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_what_is_a_deepseek_v3_by_another_name(tmp_path: Path, name: str) -> None:
    source = tiny.model_directory(tmp_path / "source", "deepseek_v3", model_type=name)
    export(str(source), "hf", tmp_path / "out", check=False)
    assert "model.layers.1.self_attn.kv_b_proj.weight" in weights.read(tmp_path / "out")
    assert mx.array_equal(logits(source), logits(tmp_path / "out"))


def test_a_multimodal_config_that_says_everything_at_the_top() -> None:
    text = {"hidden_size": 8, "vocab_size": 9, "rope_theta": 1e6, "tie_word_embeddings": True}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    whole = text | {"model_type": "qwen2_vl", "vision_config": {"depth": 1}, "image_token_id": 5, "rope_scaling": rope}
    found = checkpoint_layout.text_part(whole)
    assert found == text | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_scaling": None}


@pytest.mark.parametrize(
    ("family", "theirs", "ours"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight", "switch_mlp"),
        ("qwen3_moe", "model.layers.0.mlp.experts.2.up_proj.weight", "switch_mlp"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_b_proj.weight", "embed_q"),
        ("gpt2", "h.1.attn.c_attn.weight", "model."),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj", "gate_proj"),
    ],
)
def test_names_are_those_of_the_checkpoint(tmp_path: Path, family: str, theirs: str, ours: str) -> None:
    source = tiny.model_directory(tmp_path / "source", family)
    export(str(source), "hf", tmp_path / "out", check=False)
    names = weights.read(tmp_path / "out").keys()
    assert theirs in names
    assert not [name for name in names if ours in name and not (family == "gpt_oss" and "gate_up_proj" in name)] or (
        family == "gpt2" and not any(name.startswith("model.") for name in names)
    )


@pytest.mark.parametrize("family", ["llama", "mixtral", "deepseek_v3"])
def test_quantization_is_undone(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = (
        {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32} if family == "deepseek_v3" else {}
    )
    source = tiny.model_directory(tmp_path / "source", family, quantize={"bits": 4}, **changes)
    result = export(str(source), "hf", tmp_path / "out", check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    assert mx.allclose(logits(source), logits(tmp_path / "out"), atol=1e-4)
    assert not [name for name in weights.read(tmp_path / "out") if "scales" in name]
    assert "Quantization was undone" in result.notes[0]


@pytest.mark.parametrize(("family", "quantize"), [("llama", None), ("llama", {"bits": 8}), ("mixtral", None)])
def test_adapters_are_folded_in(tmp_path: Path, family: str, quantize: dict[str, int] | None) -> None:
    source = tiny.model_directory(tmp_path / "source", family, quantize=quantize)
    one = tiny.adapter_directory(tmp_path / "one", source)
    two = tiny.adapter_directory(tmp_path / "two", source, seed=1, rank=8)
    export(str(source), "hf", tmp_path / "out", adapter=[str(one), f"{two}=0.5"], check=False)
    network, _ = model.load_network(source)
    adapters = Adapters(network)
    adapters.add(one)
    adapters.add(two, scale=0.5)
    assert mx.allclose(network(TOKENS), logits(tmp_path / "out"), atol=2e-4)
    assert not mx.allclose(logits(source), logits(tmp_path / "out"), atol=1e-2)


def test_dtype(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "llama")
    export(str(source), "hf", tmp_path / "out", hf=HuggingFaceOptions("bfloat16"), check=False)
    assert {tensor.dtype for tensor in weights.read(tmp_path / "out").values()} == {mx.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="dtype"):
        HuggingFaceOptions("int8")  # type: ignore[arg-type]


def test_unknown_layouts_and_existing_targets_are_refused(tmp_path: Path) -> None:
    source = tiny.model_directory(tmp_path / "source", "llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "nanochat"}))
    with pytest.raises(UnsupportedError, match="not known here"):
        export(str(source), "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(InputError, match="exists"):
        export(str(source), "hf", tmp_path / "out")


def test_a_wrong_rule_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.model_directory(tmp_path / "source", "deepseek_v3")
    base = "model.layers.{i}.self_attn"
    swapped = checkpoint_rules.JoinHeads(
        f"{base}.unembed_out.weight", f"{base}.embed_q.weight", f"{base}.kv_b_proj.weight"
    )
    monkeypatch.setitem(checkpoint_layout.FAMILIES, "deepseek_v3", (swapped,))
    with pytest.raises((UnsupportedError, ValueError)):
        export(str(source), "hf", tmp_path / "out", check=False)
    lost = checkpoint_rules.Rename("model.norm.weight", "model.norms.weight")
    monkeypatch.setitem(checkpoint_layout.FAMILIES, "deepseek_v3", (lost,))
    with pytest.raises(UnsupportedError, match=r"model\.norm\.weight: is lost"):
        export(str(source), "hf", tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_every_architecture_of_the_table_is_tried() -> None:
    apart = {"qwen3_5", "qwen3_5_moe"}  # multimodal; tests/parity has a test of their own
    assert set(checkpoint_layout.FAMILIES) == set(KNOWN) | set(OTHER_NAMES) | apart
    table = (Path(__file__).parents[2] / "convert" / "README.md").read_text()
    assert f"({len(checkpoint_layout.FAMILIES)} architectures)" in table


def test_every_tensor_goes_somewhere() -> None:
    for family in KNOWN:
        network = tiny.network(family)
        tensors = flat(network.parameters())
        given = checkpoint_layout.to_checkpoint(tensors, tiny.config(family))
        zeros = sum(t.size for name, t in given.items() if "moe_statics" in name)  # ernie4_5_moe's, which MLX lacks
        assert sum(t.size for t in given.values()) == sum(t.size for t in tensors.values()) + zeros
