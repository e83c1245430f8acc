"""The name table against transformers itself: every module of every architecture in it, by name and by shape."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="pip install torch transformers peft")
transformers = pytest.importorskip("transformers", reason="pip install torch transformers peft")

from mlxlora import architecture, mlxlm  # noqa: E402
from mlxlora_convert.base import places  # noqa: E402
from mlxlora_convert.names import FAMILIES, Names, each_expert  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
MISSING: dict[str, dict[str, Any]] = {
    # what mlx-lm asks for and transformers leaves to its own defaults
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "exaone4": {"head_dim": 128, "rope_scaling": None, "sliding_window_pattern": "LLLG"},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": {"head_dim": 42, "partial_rotary_factor": 0.5, "rope_scaling": None},
    "gpt2": {"n_ctx": 1024},
    "gpt_neox": {"rotary_emb_base": 10000, "rotary_pct": 0.25},
    "qwen3_moe": {"num_experts": 128, "head_dim": 64},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
    "stablelm": {"partial_rotary_factor": 0.25},
    "deepseek_v2": {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0}},
}
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")


def shrunk(kind: str) -> Any:
    """The default configuration of an architecture with four layers. Weights are never made."""
    config = transformers.AutoConfig.for_model(kind)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for name in LAYERS:
            if hasattr(part, name):
                setattr(part, name, 4)
        for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
            if getattr(part, name, None):
                setattr(part, name, getattr(part, name)[:4])
    return config


def torch_parameters(config: Any) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        try:
            model = transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:
            model = transformers.AutoModelForImageTextToText.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("kind", sorted(FAMILIES))
def test_every_module_is_where_the_table_says(kind: str) -> None:
    config = shrunk(kind)
    theirs = torch_parameters(config)
    settings = {**config.to_dict(), "model_type": kind, **MISSING.get(kind, {})}
    network = mlxlm.build(architecture.spelled_both_ways(settings))
    names = Names(FAMILIES[kind])
    seen = places(network)
    assert len(seen) > 4 * 4
    for path, place in seen.items():
        expert = names.expert(path)
        if expert is None:
            hf = names.to_hf(path)
            if path.endswith("lm_head") and f"{hf}.weight" not in theirs:
                continue
            transposed = names.family.conv1d and place.kind == "linear"
            assert theirs[f"{hf}.weight"] == (place.shape[::-1] if transposed else place.shape), path
            assert path in names.to_mlx(hf)
            continue
        count, out, in_ = place.shape
        name = "down_proj" if expert.projection == "down_proj" else "gate_up_proj"
        rows = out if name == "down_proj" else 2 * out
        assert theirs[f"{expert.holder}.{name}"] in ((count, rows, in_), (count, in_, rows)), path
        holder = names.expert_holder(expert.holder)
        assert holder is not None and holder[1] == path.rpartition(".")[0]
        if expert.experts.each:
            assert names.single_expert(each_expert(expert, 3)) == (path, 3)
