"""In from transformers, out to transformers: the same logits, and tensor for tensor the same checkpoint."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxlora import architecture, model, weights
from mlxlora.convert import LARGEST_KL, convert
from mlxlora_convert import checkpoint_layout
from mlxlora_convert.export import export
from tests import tiny

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="pip install torch transformers")

TOKENS = [1, 70, 300, 5, 9, 41, 7, *range(20, 60)]
FAMILIES = sorted(set(tiny.FAMILIES) & set(checkpoint_layout.FAMILIES))
# mlx-lm takes the exact GELU for its tanh form, or rounds where transformers does not
LOOSE = {"gemma": 5e-3, "gemma3_text": 2e-3, "starcoder2": 2e-3, "gpt_neox": 2e-3, "gpt_oss": 0.1,
         "recurrent_gemma": 3e-3}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ROPES = [
    ("llama", {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 128}),
    ("llama", {"rope_type": "linear", "factor": 4.0}),
    ("llama", YARN), ("qwen2", YARN), ("qwen3", YARN), ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
]  # fmt: skip


def theirs(directory: Path) -> np.ndarray:
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return np.array(loaded.eval()(torch.tensor([TOKENS])).logits[0])


def ours(directory: Path) -> np.ndarray:
    return np.array(model.load_network(directory)[0](mx.array([TOKENS]))[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(tmp_path: Path, family: str) -> None:
    source = tiny.transformers_directory(tmp_path / "source", family)
    result = convert(str(source), tmp_path / "mlx")
    expected = theirs(source)
    bound = LOOSE.get(family, 1e-4)
    assert np.abs(expected - ours(tmp_path / "mlx")).max() < bound
    assert result.reference is not None and result.reference.kl < bound
    out = export(str(tmp_path / "mlx"), "hf", tmp_path / "hf")
    if family == "gpt_oss":
        assert any("YaRN" in note for note in out.notes)
    else:
        assert out.check is not None and out.check.reader == "transformers"
    assert np.abs(theirs(tmp_path / "hf") - expected).max() < (1e-5 if family == "falcon_h1" else 1e-6)
    before, after = weights.read(source), weights.read(tmp_path / "hf")
    if family == "gpt2":
        before = {name.removeprefix("transformer."): tensor for name, tensor in before.items()}
    assert before.keys() - {"lm_head.weight"} == after.keys() - {"lm_head.weight"}
    if family == "falcon_h1":  # whose factors mlx-lm multiplies into the weights, where they stay
        assert architecture.read_config(tmp_path / "hf")["embedding_multiplier"] == 1
        return
    rounded = {name for name in after if family == "qwen3_next" and "norm" in name}  # mlx-lm adds one, which rounds
    assert all(mx.array_equal(before[name], after[name]) for name in after.keys() - rounded)
    assert all(mx.allclose(before[name], after[name], rtol=0, atol=2e-7) for name in rounded)


def test_one_table_for_both_ends_keeps_both_factors(tmp_path: Path) -> None:
    source = tiny.transformers_directory(tmp_path / "source", "falcon_h1", tie_word_embeddings=True)
    convert(str(source), tmp_path / "mlx")
    out = export(str(tmp_path / "mlx"), "hf", tmp_path / "hf")
    assert out.check is not None and "config.json says 1" in " ".join(out.notes)
    assert np.abs(theirs(tmp_path / "hf") - theirs(source)).max() < 1e-5


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("jamba", {"num_experts": 4}, "weighs this jamba model's chosen experts"),
        ("falcon_h1", {"key_multiplier": 0.4}, "factors on this falcon_h1 model's keys"),
        ("ernie4_5_moe", {}, "bias with which this model's routers"),
    ],
)
def test_what_mlx_lm_computes_otherwise_is_said(
    tmp_path: Path, family: str, changes: dict[str, Any], said: str
) -> None:
    source = tiny.transformers_directory(tmp_path / "source", family, **changes)
    if family == "ernie4_5_moe":
        state = weights.read(source)
        for name in state:
            if "moe_statics" in name:
                state[name] = mx.array([[0.3, -0.3, 0.2, -0.2]])
        mx.save_safetensors(str(source / "model.safetensors"), dict(state), metadata={"format": "pt"})
    result = convert(str(source), tmp_path / "mlx")
    assert said in " ".join(result.warnings)
    assert np.abs(theirs(source) - ours(tmp_path / "mlx")).max() > 1e-2
    out = export(str(tmp_path / "mlx"), "hf", tmp_path / "hf")
    if family == "jamba":  # the same checkpoint, which transformers goes on to compute in its own way
        assert said in " ".join(out.notes)
        assert np.abs(theirs(tmp_path / "hf") - theirs(source)).max() < 1e-6
    else:  # the model that mlx-lm made of it
        assert out.check is not None
        assert np.abs(theirs(tmp_path / "hf") - ours(tmp_path / "mlx")).max() < 1e-4


@pytest.mark.parametrize(
    ("outer", "family", "changes"),
    [
        ("gemma3", "gemma3_text", {"hidden_size": 64}),
        ("mistral3", "mistral", {}),
        ("mistral3", "ministral3", {"tie_word_embeddings": True}),
        ("llava", "mistral", {}),
        ("pixtral", "mistral", {}),
        ("qwen2_5_vl", "qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}),
        ("qwen3_vl", "qwen3", {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}),
        ("qwen3_vl_moe", "qwen3_moe", {}),
        ("kimi_vl", "deepseek_v3", {}),
        ("kimi_k25", "deepseek_v3", {}),
    ],
)
@pytest.mark.parametrize("quantize", [None, {"bits": 8}])
def test_the_text_model_of_a_multimodal_one(
    tmp_path: Path, outer: str, family: str, changes: dict[str, Any], quantize: dict[str, int] | None
) -> None:
    source = tiny.model_directory(tmp_path / "source", family, quantize, **changes)
    inside = {f"language_model.{name}": tensor for name, tensor in weights.read(source).items()}
    if family == "gemma3_text":
        inside = {name: tensor for name, tensor in inside.items() if "lm_head" not in name}
    mx.save_safetensors(str(source / "model.safetensors"), inside, metadata={"format": "mlx"})
    inner = architecture.read_config(source)
    if outer.startswith("qwen"):
        inner["model_type"] = f"{outer}_text"
    kept = ("quantization", "quantization_config", "eos_token_id", "torch_dtype")
    whole = {"model_type": outer, "text_config": inner, **{name: inner.pop(name) for name in kept if name in inner}}
    (source / "config.json").write_text(json.dumps(whole | {"vocab_size": tiny.VOCABULARY}))
    out = export(str(source), "hf", tmp_path / "hf")
    assert out.check is not None and out.check.reader == "transformers" and family in " ".join(out.notes)
    written = architecture.read_config(tmp_path / "hf")
    assert written["model_type"] == family and written["eos_token_id"] == 2 and "text_config" not in written
    assert np.abs(theirs(tmp_path / "hf") - ours(source)).max() < LOOSE.get(family, 1e-4)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_the_multimodal_qwens_keep_their_layout(tmp_path: Path, family: str) -> None:
    import transformers

    inner = {**tiny.config("qwen3_next"), "model_type": f"{family}_text"}
    moe = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    inner = {name: value for name, value in inner.items() if family == "qwen3_5_moe" or name not in moe}
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    inner = {**inner, "rope_parameters": rope}
    config = transformers.AutoConfig.for_model(family, text_config=inner, tie_word_embeddings=False, eos_token_id=2)
    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(config).float()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {name.replace("model.", "model.language_model.", 1): mx.array(tensor.detach().numpy())
             for name, tensor in built.named_parameters()}  # fmt: skip
    source = tiny.tokenizer(tmp_path / "source")
    mx.save_safetensors(str(source / "model.safetensors"), state, metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    convert(str(source), tmp_path / "mlx", check=False)
    expected = theirs(source)
    assert np.abs(expected - ours(tmp_path / "mlx")).max() < 1e-4
    out = export(str(tmp_path / "mlx"), "hf", tmp_path / "hf")
    assert out.check is not None and out.check.difference < 1e-4 and "no vision" in " ".join(out.notes)
    assert np.abs(theirs(tmp_path / "hf") - expected).max() < 1e-5
    assert weights.read(tmp_path / "hf").keys() == state.keys()


@pytest.mark.parametrize(("family", "scaling"), ROPES)
def test_rope_of_every_spelling(tmp_path: Path, family: str, scaling: dict[str, object]) -> None:
    source = tiny.transformers_directory(tmp_path / "source", family, rope_scaling=scaling)
    assert "rope_theta" not in architecture.read_config(source)  # transformers 5 spells it the new way alone
    convert(str(source), tmp_path / "mlx", check=False)
    expected = theirs(source)
    assert np.abs(expected - ours(tmp_path / "mlx")).max() < LOOSE.get(family, 1e-4)
    assert np.abs(expected - theirs(tmp_path / "mlx")).max() < 1e-6  # and reads what we wrote in both


def test_torch_files_come_in_by_the_safe_loader(tmp_path: Path) -> None:
    from mlxlora.errors import ModelError

    source = tiny.transformers_directory(tmp_path / "source", "llama")
    tensors = {name: np.array(tensor) for name, tensor in weights.read(source).items()}
    expected = ours(source)
    (source / "model.safetensors").unlink()
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    state["lm_head.weight"] = state["lm_head.weight"].to(torch.bfloat16)
    torch.save(state, source / "pytorch_model.bin")
    convert(str(source), tmp_path / "mlx", check=False)
    assert np.abs(expected - ours(tmp_path / "mlx")).max() < 0.05

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safe loader"):
        convert(str(source), tmp_path / "evil")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "evil").exists()


def test_windows_beyond_the_probe_are_warned_of_and_measured(tmp_path: Path) -> None:
    source = tiny.transformers_directory(tmp_path / "source", "mistral", sliding_window=16)
    result = convert(str(source), tmp_path / "mlx")
    assert result.reference is not None and result.reference.kl > LARGEST_KL
    assert "window of 16" in result.warnings[0]
