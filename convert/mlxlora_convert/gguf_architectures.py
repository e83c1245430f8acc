"""What GGUF calls things, per model family: tensors, hyper-parameters, and what is refused. Tables, no code.

One `Family` a model type. Names map one to one, so reading is the same table backwards.
llama.cpp's own constants: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

# How the rows of a tensor are rearranged or changed on the way to GGUF; `gguf_tensors` holds the code for each.
Change = Literal[
    "",
    "rotary",  # rows of each head from halves (x1 … | x2 …) to neighbours (x1 x2 x1 x2 …), llama.cpp's "norm" form
    "plus_one",  # gemma stores a norm's weight minus one
    "query_scale",  # llama.cpp fixes gemma's attention scale: what differs is folded into the query projection
    "query_scale_norm",  # the same for a query norm that is stored minus one
    "one_row",  # [1, n] there is [n] here
    "per_head",  # one vector a head (norms.0 … norms.n) there is one matrix here
]


@dataclass(frozen=True, slots=True)
class Tensors:
    """A module of the MLX model and its name in GGUF; weight and bias go along. `{i}` is the block.

    optional: the model may do without
    keep:     always written in float32 (routers, whose rounding changes which expert is chosen)
    """

    gguf: str
    mlx: str
    change: Change = ""
    optional: bool = False
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Field:
    """A hyper-parameter: GGUF's key (without the architecture), config.json's key, its type, and a default.

    default: the value when config.json lacks it; a `=name` takes another field's value; None: it must be there
    optional: not written when it is missing
    """

    gguf: str
    config: str
    kind: Literal["uint32", "float32", "bool"] = "uint32"
    default: Any = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One model type of config.json.

    gguf:       GGUF's architecture
    tensors:    modules; fields: hyper-parameters
    scalings:   the rope scalings that both MLX's model and llama.cpp apply
    required:   config values that llama.cpp takes for granted; another value is refused
    from_names: config keys that are true when a tensor is there (GGUF does not say them)
    defaults:   what config.json needs beside the fields, on import
    class_name: the transformers class, for `architectures`
    """

    model_type: str
    gguf: str
    tensors: tuple[Tensors, ...]
    fields: tuple[Field, ...]
    class_name: str
    scalings: tuple[str, ...] = ()
    required: tuple[tuple[str, Any, str], ...] = ()
    from_names: tuple[tuple[str, str], ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    experts: bool = False


def block(
    *pairs: tuple[str, str], change: Change = "", optional: bool = False, keep: bool = False
) -> tuple[Tensors, ...]:
    """Modules of every block, from (GGUF's, MLX's) short names."""
    return tuple(
        Tensors(f"blk.{{i}}.{ours}", f"model.layers.{{i}}.{theirs}", change, optional, keep) for ours, theirs in pairs
    )


ENDS = (
    Tensors("token_embd", "model.embed_tokens"),
    Tensors("output_norm", "model.norm"),
    Tensors("output", "lm_head", optional=True),
)
QUERY, KEY = ("attn_q", "self_attn.q_proj"), ("attn_k", "self_attn.k_proj")
VALUE_OUT = block(("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj"))
ATTENTION = block(QUERY, KEY) + VALUE_OUT
ROTARY_ATTENTION = block(QUERY, KEY, change="rotary") + VALUE_OUT
NORMS = block(("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
QK_NORMS = block(("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"))
MLP = block(("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"))
LLAMA = ENDS + ROTARY_ATTENTION + NORMS + MLP
GEMMA = (
    ENDS[0],
    Tensors("output_norm", "model.norm", "plus_one"),
    Tensors("output", "lm_head", optional=True),
    *block(
        ("attn_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("ffn_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
        change="plus_one",
    ),
    *MLP,
)


def experts(module: str) -> tuple[Tensors, ...]:
    """The routed experts of `module`: the router in float32, the experts stacked [experts, out, in]."""
    names = (("ffn_gate_exps", "gate_proj"), ("ffn_up_exps", "up_proj"), ("ffn_down_exps", "down_proj"))
    router = block(("ffn_gate_inp", f"{module}.gate"), keep=True)
    return router + block(*((ours, f"{module}.switch_mlp.{theirs}") for ours, theirs in names))


SIZES = (
    Field("context_length", "max_position_embeddings"),
    Field("embedding_length", "hidden_size"),
    Field("block_count", "num_hidden_layers"),
    Field("feed_forward_length", "intermediate_size"),
    Field("attention.head_count", "num_attention_heads"),
    Field("attention.head_count_kv", "num_key_value_heads", default="=num_attention_heads"),
    Field("vocab_size", "vocab_size"),
)
RMS = Field("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float32")
LAYER_NORM = Field("attention.layer_norm_epsilon", "layer_norm_eps", "float32", 1e-5)
BASE = (*SIZES, RMS)
MIXTURE = (
    Field("expert_count", "num_experts"),
    Field("expert_used_count", "num_experts_per_tok"),
    Field("expert_feed_forward_length", "moe_intermediate_size"),
)
GATES = (("attention_bias", "blk.0.attn_q.bias"), ("mlp_bias", "blk.0.ffn_gate.bias"))
NO_WINDOW = ("use_sliding_window", False, "llama.cpp gives this architecture no sliding window")
NEIGHBOURS = ("rope_traditional", False, "llama.cpp's rotary form for this architecture is the other one")

FAMILIES: tuple[Family, ...] = (
    Family(
        "llama", "llama", LLAMA, BASE, "LlamaForCausalLM",
        scalings=("linear", "llama3", "yarn", "longrope"), from_names=GATES,
    ),
    Family(
        "mistral", "llama", LLAMA, BASE, "MistralForCausalLM",
        scalings=("linear", "llama3", "yarn", "longrope"), from_names=GATES,
    ),
    Family(
        "mixtral", "llama", ENDS + ROTARY_ATTENTION + NORMS + experts("block_sparse_moe"),
        (*BASE, Field("expert_count", "num_local_experts"), Field("expert_used_count", "num_experts_per_tok")),
        "MixtralForCausalLM", experts=True,
    ),
    Family(
        "qwen2", "qwen2", ENDS + ATTENTION + NORMS + MLP, BASE, "Qwen2ForCausalLM",
        scalings=("linear", "yarn"), required=(NO_WINDOW, NEIGHBOURS),
    ),
    Family(
        "qwen2_moe", "qwen2moe",
        ENDS + ATTENTION + NORMS + experts("mlp")
        + block(("ffn_gate_inp_shexp", "mlp.shared_expert_gate"), change="one_row", keep=True)
        + block(
            ("ffn_gate_shexp", "mlp.shared_expert.gate_proj"),
            ("ffn_up_shexp", "mlp.shared_expert.up_proj"),
            ("ffn_down_shexp", "mlp.shared_expert.down_proj"),
        ),
        (*BASE, *MIXTURE, Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size")),
        "Qwen2MoeForCausalLM", experts=True,
        required=(
            NO_WINDOW, NEIGHBOURS,
            ("norm_topk_prob", False, "llama.cpp does not renormalise this architecture's expert weights"),
            ("decoder_sparse_step", 1, "llama.cpp has experts in every block"),
            ("mlp_only_layers", [], "llama.cpp has experts in every block"),
            ("tie_word_embeddings", False, "MLX's model has a head of its own"),
        ),
    ),
    Family(
        "qwen3", "qwen3", ENDS + ATTENTION + QK_NORMS + NORMS + MLP, BASE, "Qwen3ForCausalLM",
        scalings=("linear", "yarn"), required=(NO_WINDOW, NEIGHBOURS),
    ),
    Family(
        "qwen3_moe", "qwen3moe", ENDS + ATTENTION + QK_NORMS + NORMS + experts("mlp"), (*BASE, *MIXTURE),
        "Qwen3MoeForCausalLM", experts=True,
        required=(
            NO_WINDOW,
            ("norm_topk_prob", True, "llama.cpp renormalises this architecture's expert weights"),
            ("decoder_sparse_step", 1, "llama.cpp has experts in every block"),
            ("mlp_only_layers", [], "llama.cpp has experts in every block"),
        ),
    ),
    Family(
        "gemma2", "gemma2", GEMMA + block(QUERY, change="query_scale") + block(KEY) + VALUE_OUT,
        (
            *BASE,
            Field("attn_logit_softcapping", "attn_logit_softcapping", "float32", 50.0),
            Field("final_logit_softcapping", "final_logit_softcapping", "float32", 30.0),
            Field("attention.sliding_window", "sliding_window", default=4096),
        ),
        "Gemma2ForCausalLM", required=(NEIGHBOURS,),
    ),
    Family(
        "gemma3_text", "gemma3",
        GEMMA + ATTENTION + block(("attn_q_norm", "self_attn.q_norm"), change="query_scale_norm")
        + block(("attn_k_norm", "self_attn.k_norm"), change="plus_one"),
        (
            *BASE,
            Field("attention.sliding_window", "sliding_window", default=512),
            Field("attention.sliding_window_pattern", "sliding_window_pattern", default=6),
            Field("rope.freq_base_swa", "rope_local_base_freq", "float32", 10_000.0),
        ),
        "Gemma3ForCausalLM", scalings=("linear",),
    ),
    Family(
        "phi3", "phi3",
        ENDS + NORMS + block(
            ("attn_qkv", "self_attn.qkv_proj"), ("attn_output", "self_attn.o_proj"),
            ("ffn_up", "mlp.gate_up_proj"), ("ffn_down", "mlp.down_proj"),
        ),
        BASE, "Phi3ForCausalLM", scalings=("longrope",), required=(NEIGHBOURS,),
    ),
    Family(
        "olmo2", "olmo2",
        ENDS + ATTENTION + QK_NORMS + MLP + block(
            ("post_attention_norm", "post_attention_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm")
        ),
        BASE, "Olmo2ForCausalLM", scalings=("linear", "yarn"),
        required=(
            NEIGHBOURS, ("attention_bias", False, "llama.cpp has no biases here"),
            ("mlp_bias", False, "llama.cpp has no biases here"),
        ),
    ),
    Family(
        "granite", "granite", LLAMA,
        (
            *BASE,
            Field("logit_scale", "logits_scaling", "float32"),
            Field("attention.scale", "attention_multiplier", "float32"),
            Field("embedding_scale", "embedding_multiplier", "float32"),
            Field("residual_scale", "residual_multiplier", "float32"),
        ),
        "GraniteForCausalLM", scalings=("linear", "longrope"), from_names=GATES,
    ),
    Family(
        "cohere", "command-r",
        ENDS[:2] + ATTENTION + MLP + block(("attn_norm", "input_layernorm"))
        + block(("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"), optional=True),
        (*SIZES, LAYER_NORM, Field("logit_scale", "logit_scale", "float32", 0.0625)),
        "CohereForCausalLM",
        from_names=(("use_qk_norm", "blk.0.attn_q_norm.weight"), ("attention_bias", "blk.0.attn_q.bias")),
        required=(
            ("layer_norm_bias", False, "llama.cpp has no such biases here"),
            ("tie_word_embeddings", True, "llama.cpp ties this architecture's head to its embeddings"),
        ),
    ),
    Family(
        "smollm3", "smollm3", LLAMA, BASE, "SmolLM3ForCausalLM", scalings=("linear", "yarn"), from_names=GATES,
        required=(("no_rope_layer_interval", 4, "llama.cpp leaves out the rotation in every fourth block"),),
    ),
    Family(
        "stablelm", "stablelm",
        ENDS + ATTENTION + MLP + block(("attn_norm", "input_layernorm"))
        + block(("ffn_norm", "post_attention_layernorm"), optional=True)
        + block(
            ("attn_q_norm", "self_attn.q_layernorm"), ("attn_k_norm", "self_attn.k_layernorm"),
            change="per_head", optional=True,
        ),
        (
            *SIZES,
            LAYER_NORM,
            Field("use_parallel_residual", "use_parallel_residual", "bool", False),
        ),
        "StableLmForCausalLM",
        from_names=(("use_qkv_bias", "blk.0.attn_q.bias"), ("qk_layernorm", "blk.0.attn_q_norm.weight")),
    ),
    Family(
        "starcoder2", "starcoder2",
        ENDS + ATTENTION + NORMS + block(("ffn_up", "mlp.c_fc"), ("ffn_down", "mlp.c_proj")),
        (*SIZES, Field("attention.layer_norm_epsilon", "norm_epsilon", "float32", 1e-5)),
        "Starcoder2ForCausalLM", defaults=(("use_bias", True),),
        required=(("use_bias", True, "MLX's model has biases"),),
    ),
)  # fmt: skip


def family_of(config: dict[str, Any]) -> Family | None:
    """The family of a config.json, or None when it has no table. Multimodal Gemma 3 counts by its text part."""
    name = config.get("model_type")
    return next((family for family in FAMILIES if family.model_type == name), None)


def families_in(architecture: str) -> list[Family]:
    """The families that GGUF writes as `architecture`."""
    return [family for family in FAMILIES if family.gguf == architecture]
