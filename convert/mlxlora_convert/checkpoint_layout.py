"""How each architecture's tensors stand in a Hugging Face checkpoint: what mlx-lm's `sanitize()` did, undone.

A family is a tuple of rules; a rule takes the MLX tensors that it fits and gives the checkpoint's. Tensors that no
rule fits keep their name and their values. Every rule is a bijection whose inverse is mlx-lm's own `sanitize()`:
huggingface.py applies that to what the rules gave and demands the same names and bits, for the very model that is
exported.

An architecture that is not in the table is refused. `sanitize()` accepts its own output as well, so without a table
experts in MLX's layout would pass that proof, and transformers would load them as random weights without an error.
"""

from __future__ import annotations

import re
from typing import Any

from mlxlora.errors import UnsupportedError, nearest
from mlxlora_convert.checkpoint_rules import (
    AsVector,
    Config,
    Convolution,
    Interleave,
    JoinHeads,
    LessOne,
    Rename,
    Rule,
    StackHalves,
    Tensors,
    Transpose,
    TransposedExperts,
    Unstack,
    WithoutBias,
)


def _experts(
    block: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"), stack: str = "switch_mlp"
) -> tuple[Rule, ...]:
    base = f"model.layers.{{i}}.{block}"
    return tuple(
        Unstack(f"{base}.{stack}.{mlx}.weight", f"{base}.experts.{{e}}.{hf}.weight")
        for mlx, hf in zip(("gate_proj", "up_proj", "down_proj"), names, strict=True)
    )


_ATTENTION = "model.layers.{i}.self_attn"
_MLA: tuple[Rule, ...] = (
    JoinHeads(f"{_ATTENTION}.embed_q.weight", f"{_ATTENTION}.unembed_out.weight", f"{_ATTENTION}.kv_b_proj.weight"),
)
_GRANITE = "model.layers.{i}.block_sparse_moe"
_GRANITE_EXPERTS = (
    StackHalves(
        f"{_GRANITE}.switch_mlp.gate_proj.weight",
        f"{_GRANITE}.switch_mlp.up_proj.weight",
        f"{_GRANITE}.input_linear.weight",
    ),
    Rename(f"{_GRANITE}.switch_mlp.down_proj.weight", f"{_GRANITE}.output_linear.weight"),
)
_MAMBA = "model.layers.{i}.mamba"
_SHARED = "model.layers.{i}.shared_mlp"
_OSS = "model.layers.{i}.mlp.experts"
_LFM2 = "model.layers.{i}.feed_forward"
_LFM2_NAMES = (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
_XIELU = "model.layers.{i}.mlp.act_fn"
_GEMMA4 = "model.layers.{i}.experts"
_QWEN = "model.layers.{i}.mlp"
_QWEN_NEXT = (
    "model.norm", "model.layers.{i}.input_layernorm", "model.layers.{i}.post_attention_layernorm",
    f"{_ATTENTION}.q_norm", f"{_ATTENTION}.k_norm",
)  # fmt: skip
_GPT2: tuple[Rule, ...] = (
    *(Transpose(f"model.h.{{i}}.{name}.weight") for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    Rename("model.{rest}", "{rest}"),
)
# `sanitize()` changes no name and no value of these (it drops precomputed rotary tables and tied heads)
_SAME = (
    "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_bigcode",
    "granite", "helium", "hunyuan_v1_dense", "llama", "ministral3", "mistral", "nemotron", "olmo2", "olmo3", "phi",
    "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip

FAMILIES: dict[str, tuple[Rule, ...]] = {
    **dict.fromkeys(_SAME, ()),
    "mixtral": _experts("block_sparse_moe", ("w1", "w3", "w2")),
    "phimoe": _experts("block_sparse_moe", ("w1", "w3", "w2")),
    "qwen2_moe": _experts("mlp"),
    "qwen3_moe": _experts("mlp"),
    "olmoe": _experts("mlp"),
    "glm4_moe": _experts("mlp"),
    "deepseek_v2": _experts("mlp"),
    "solar_open": _experts("mlp"),
    "exaone_moe": (
        *_experts("mlp"),
        Rename("model.layers.{i}.mlp.gate.e_score_correction_bias", "model.layers.{i}.mlp.e_score_correction_bias"),
    ),
    **dict.fromkeys(
        ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "joyai_llm_flash", "kimi_k2"),
        (*_experts("mlp"), *_MLA),
    ),
    **dict.fromkeys(("afmoe", "dots1"), _experts("mlp", stack="experts")),
    "granitemoe": _GRANITE_EXPERTS,
    "granitemoehybrid": (
        *_GRANITE_EXPERTS,
        StackHalves(f"{_QWEN}.gate_proj.weight", f"{_QWEN}.up_proj.weight", f"{_SHARED}.input_linear.weight"),
        Rename(f"{_QWEN}.down_proj.weight", f"{_SHARED}.output_linear.weight"),
        Convolution(f"{_MAMBA}.conv1d.weight"),
    ),
    "jamba": (*_experts("feed_forward"), Convolution(f"{_MAMBA}.conv1d.weight")),
    "falcon_h1": (Convolution(f"{_MAMBA}.conv1d.weight"),),
    "ernie4_5_moe": (
        *_experts("mlp"),
        WithoutBias("model.layers.{i}.mlp.gate.weight", "model.layers.{i}.mlp.moe_statics.e_score_correction_bias"),
    ),
    "mellum": _experts("mlp"),
    "recurrent_gemma": (Convolution("model.layers.{i}.temporal_block.conv_1d.weight"),),
    "minimax_m2": _experts("block_sparse_moe", ("w1", "w3", "w2")),
    "gemma4_text": (
        StackHalves(
            f"{_GEMMA4}.switch_glu.gate_proj.weight",
            f"{_GEMMA4}.switch_glu.up_proj.weight",
            f"{_GEMMA4}.gate_up_proj",
        ),
        Rename(f"{_GEMMA4}.switch_glu.down_proj.weight", f"{_GEMMA4}.down_proj"),
    ),
    "qwen3_next": (
        *_experts("mlp"),
        Convolution("model.layers.{i}.linear_attn.conv1d.weight"),
        *(LessOne(f"{name}.weight") for name in _QWEN_NEXT),
    ),
    **dict.fromkeys(
        ("qwen3_5", "qwen3_5_moe"),
        (
            Rename("language_model.lm_head.{rest}", "lm_head.{rest}"),
            Rename("language_model.{rest}", "{rest}"),
            StackHalves(
                f"{_QWEN}.switch_mlp.gate_proj.weight",
                f"{_QWEN}.switch_mlp.up_proj.weight",
                f"{_QWEN}.experts.gate_up_proj",
            ),
            Rename(f"{_QWEN}.switch_mlp.down_proj.weight", f"{_QWEN}.experts.down_proj"),
            Convolution("model.layers.{i}.linear_attn.conv1d.weight"),
            *(LessOne(f"{name}.weight") for name in _QWEN_NEXT),
            Rename("model.{rest}", "model.language_model.{rest}"),
        ),
    ),
    "nemotron_h": (
        Convolution("backbone.layers.{i}.mixer.conv1d.weight"),
        *(
            Unstack(
                f"backbone.layers.{{i}}.mixer.switch_mlp.{mlx}.weight",
                f"backbone.layers.{{i}}.mixer.experts.{{e}}.{hf}.weight",
            )
            for mlx, hf in (("fc1", "up_proj"), ("fc2", "down_proj"))
        ),
    ),
    "apertus": (AsVector(f"{_XIELU}.alpha_p"), AsVector(f"{_XIELU}.alpha_n")),
    "lfm2": (Convolution("model.layers.{i}.conv.conv.weight"),),
    "lfm2_moe": (
        Convolution("model.layers.{i}.conv.conv.weight"),
        *(
            rule
            for mlx, hf in _LFM2_NAMES
            for rule in (
                Unstack(f"{_LFM2}.switch_mlp.{mlx}.weight", f"{_LFM2}.experts.{{e}}.{hf}.weight"),
                Rename(f"{_LFM2}.{mlx}.weight", f"{_LFM2}.{hf}.weight"),
            )
        ),
    ),
    **dict.fromkeys(("mamba", "mamba2"), (Convolution("backbone.layers.{i}.mixer.conv1d.weight"),)),
    "gpt2": _GPT2,
    "gptj": (Rename("model.{rest}", "transformer.{rest}"),),
    "gpt_neox": (
        Rename("model.embed_out.{rest}", "embed_out.{rest}"),
        Rename("model.h.{rest}", "gpt_neox.layers.{rest}"),
        Rename("model.{rest}", "gpt_neox.{rest}"),
    ),
    "gpt_oss": (
        Interleave(f"{_OSS}.gate_proj.weight", f"{_OSS}.up_proj.weight", f"{_OSS}.gate_up_proj"),
        Interleave(f"{_OSS}.gate_proj.bias", f"{_OSS}.up_proj.bias", f"{_OSS}.gate_up_proj_bias"),
        TransposedExperts(f"{_OSS}.down_proj.weight", f"{_OSS}.down_proj"),
        Rename(f"{_OSS}.down_proj.bias", f"{_OSS}.down_proj_bias"),
    ),
}


# Multimodal models of which mlx-lm keeps the language model alone, below `language_model`: the type of its text_config
# where that does not say one. They leave as the text models that they are here.
TEXT_PARTS = {
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "kimi_k25": "deepseek_v3", "kimi_vl": "deepseek_v3",
    "llava": "llama", "mistral3": "mistral", "pixtral": "mistral", "qwen2_5_vl": "qwen2", "qwen2_vl": "qwen2",
    "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe",
}  # fmt: skip
# what a text_config calls itself there, and the text model that it is
_TEXT_TYPES = {
    "kimi_k2": "deepseek_v3", "qwen2_5_vl_text": "qwen2", "qwen2_vl_text": "qwen2", "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}  # fmt: skip
_CLASSES = {
    "deepseek_v3": "DeepseekV3ForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "gemma4_text": "Gemma4ForCausalLM",
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
}  # fmt: skip
_WHOLE = ("qwen2_vl", "qwen2_5_vl")  # whose older config.json says everything at the top, the text's settings too
# Those that transformers loads as a text model whatever else their config.json describes.
VISION_LEFT_OUT = ("qwen3_5", "qwen3_5_moe")
# what a multimodal config.json says beside its text_config, and a text model's needs
_CARRIED = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
_NOT_TEXT = re.compile(r"(vision|audio|image|video|mm)_.*|auto_map|text_config")


def text_part(config: Config) -> Config | None:
    """config.json of the text model inside of a multimodal one, or None for a model that is a text model anyway."""
    kind = str(config.get("model_type"))
    if kind not in TEXT_PARTS:
        return None
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        if kind not in _WHOLE:
            return None
        inner = {key: value for key, value in config.items() if not _NOT_TEXT.fullmatch(key)} | {"model_type": None}
    said = str(inner.get("model_type") or TEXT_PARTS[kind])
    name = _TEXT_TYPES.get(said, said)
    carried = {key: config[key] for key in _CARRIED if config.get(key) is not None and inner.get(key) is None}
    return _of_one_axis({**inner, **carried, "model_type": name, "architectures": [_CLASSES.get(name, name)]})


def _of_one_axis(config: Config) -> Config:
    """Without the rotation by time, height and width (M-RoPE): in text the three are one, which is plain rotation."""
    result = dict(config)
    for key in ("rope_scaling", "rope_parameters"):
        settings = result.get(key)
        if isinstance(settings, dict) and "mrope_section" in settings:
            left = {name: value for name, value in settings.items() if not name.startswith("mrope_")}
            kinds = {name: "default" for name in ("rope_type", "type") if left.get(name) == "mrope"}
            plain = key == "rope_scaling" and {**left, **kinds}.get("rope_type", "default") == "default"
            result[key] = None if plain else {**left, **kinds}
    return result


# Settings that config.json has to say otherwise than before for the tensors to be right: see `settings`
ANEW = {
    "falcon_h1": (
        "attention_in_multiplier", "attention_out_multiplier", "embedding_multiplier", "key_multiplier",
        "lm_head_multiplier", "mlp_multipliers", "ssm_in_multiplier", "ssm_multipliers", "ssm_out_multiplier",
    ),
}  # fmt: skip
# What a person should know of a layout
NOTES = {
    "ernie4_5_moe": "mlx-lm leaves out the bias with which the routers choose experts: written as zeros, so that "
    "transformers chooses as mlx-lm does.",
    "falcon_h1": "mlx-lm multiplies this model's factors into its weights, where they stay: config.json says 1 for "
    "each of them.",
}


def settings(config: Config, arguments: Any) -> Config:
    """The settings of `ANEW`. `arguments` is what mlx-lm read out of the configuration, with its own defaults."""
    if config.get("model_type") not in ANEW:
        return {}
    assert config["model_type"] == "falcon_h1"  # the only one so far
    factors: Config = dict.fromkeys(ANEW["falcon_h1"], 1.0)
    if arguments.tie_word_embeddings:  # one table for both ends, and it was multiplied by the other end's factor
        factors["lm_head_multiplier"] = arguments.lm_head_multiplier / arguments.embedding_multiplier
    return {**factors, "mlp_multipliers": [1.0] * 2, "ssm_multipliers": [1.0] * 5}


def rules(config: Config) -> tuple[Rule, ...]:
    """The rules for a model. Raises UnsupportedError for an architecture whose inverse is not known."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"How '{kind}' stands in a Hugging Face checkpoint is not known here, so it is not exported: a wrong "
            f"layout would load without an error.{nearest(kind, list(FAMILIES))} Known: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[kind]


def to_checkpoint(tensors: Tensors, config: Config) -> Tensors:
    """The tensors of a Hugging Face checkpoint from those of the network (lazy). `tensors` stays as it is."""
    result = dict(tensors)
    for rule in rules(config):
        rule.apply(result, config)
    return result
