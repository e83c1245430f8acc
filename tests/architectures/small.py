"""A small configuration for every architecture of mlx-lm: one table of values by the name of the setting.

Architectures name the same things alike, and mlx-lm takes from a configuration only what it knows, so one table serves
nearly all; what an architecture needs besides stands in `OWN`.
"""

from __future__ import annotations

from typing import Any

LAYERS = 4
KINDS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
SMALL: dict[str, Any] = {
    # sizes
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "hidden_dim": 32, "num_layers": LAYERS, "num_heads": 4, "num_kv_heads": 2, "n_embd": 32, "n_head": 4,
    "n_layer": LAYERS, "n_positions": 256, "n_ctx": 256, "n_inner": 64, "d_model": 32, "n_layers": LAYERS, "n_heads": 4,
    "n_kv_heads": 2, "num_query_heads": 4, "model_dim": 32, "num_transformer_layers": LAYERS, "block_size": 256,
    "model_max_length": 256, "ffn_hidden_size": 64, "intermediate_size_mlp": 64, "ff_intermediate_size": 64,
    "block_dim": 32, "num_attention_groups": 2,
    # norms, biases, scales
    "rms_norm_eps": 1e-5, "norm_eps": 1e-5, "layer_norm_eps": 1e-5, "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5, "attention_bias": False, "mlp_bias": False, "use_bias": False, "use_qkv_bias": False,
    "tie_word_embeddings": False, "use_qk_norm": True, "qk_norm": True, "post_norm": True, "logits_scaling": 2.0,
    "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "dim_model_base": 32,
    "scale_depth": 1.0, "scale_emb": 1.0, "logits_soft_cap": 30.0, "gegelu_limit": 20.0, "hidden_act": "silu",
    # positions and windows
    "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "rotary_pct": 0.5, "rotary_emb_base": 10000,
    "rotary_dim": 4, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "sliding_window": 8, "sliding_window_size": 8, "layer_types": KINDS, "sliding_window_pattern": 2,
    "attention_window_size": 8, "swa_rope_theta": 10000.0, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 8, "swa_v_head_dim": 8, "sliding_window_layers": [0, 2],
    # experts
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "norm_topk_prob": True, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_topk": 2,
    "moe_layer_freq": 1, "mlp_only_layers": [], "decoder_sparse_step": 1, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "num_shared_expert": 1, "moe_num_experts": 4, "num_dense_layers": 1,
    "expert_ffn_hidden_size": 32, "zero_expert_num": 1, "zero_expert_type": "identity", "use_mixed_mlp_moe": False,
    "use_expert_bias": True, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    # latent attention
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "mla_scale_q_lora": True, "mla_scale_kv_lora": True, "attention_method": "MLA",
    # states
    "state_size": 8, "ssm_state_size": 8, "time_step_rank": 4, "conv_kernel": 3, "use_conv_bias": True,
    "conv_bias": True, "conv_L_cache": 3, "n_groups": 1, "mamba_d_conv": 3, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_num_heads": 4, "mamba_head_dim": 8, "mamba_proj_bias": False, "time_step_limit": (0.0, 1.0),
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3, "conv1d_width": 3, "conv_window": 2, "layer_group_size": 2, "group_norm_size": 1,
    "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
    "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64, "use_cla": False, "cla_share_factor": 2,
    "dense_attention_every_n_layers": 2, "num_kv_reuse_layers": 1,
}  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "Klear": {"num_experts": 4},
    "gpt2": {}, "mamba": {"intermediate_size": 64}, "falcon_mamba": {"intermediate_size": 64},
    "mamba2": {"num_heads": 4, "head_dim": 16, "intermediate_size": 64, "expand": 2},
    "dbrx": {
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 32},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "gemma3_text": {"query_pre_attn_scalar": 8, "rope_local_base_freq": 10000.0},
    "gemma2": {"query_pre_attn_scalar": 8},
    "nemotron": {"hidden_act": "relu2"},
    "phi3": {"partial_rotary_factor": 1.0},
    "openelm": {"ffn_multipliers": [2.0] * LAYERS, "ffn_dim_divisor": 8, "num_query_heads": [4] * LAYERS,
                "num_kv_heads": [2] * LAYERS},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2), "mamba_n_heads": 8, "mamba_d_head": 8,
                         "mamba_n_groups": 1, "position_embedding_type": "rope"},
    "lfm2": {"full_attn_idxs": [1, 3], "layer_types": ["conv", "full_attention"] * (LAYERS // 2),
             "block_ff_dim": 64, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0,
             "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {"full_attn_idxs": [1, 3], "layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "nemotron_h": {"hybrid_override_pattern": "M*-E", "n_groups": 2, "mlp_hidden_act": "relu2",
                   "moe_shared_expert_intermediate_size": 32},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention"], "attention_bias": False},
    "qwen3_next": {"full_attention_interval": 2},
    "smollm3": {"no_rope_layers": [1, 0] * (LAYERS // 2), "no_rope_layer_interval": 2},
    "starcoder2": {"norm_epsilon": 1e-5},
    "stablelm": {"use_parallel_residual": False, "qk_layernorm": False},
    "mimo_v2_flash": {"hybrid_layer_pattern": [1, 0] * (LAYERS // 2), "add_swa_attention_sink_bias": True,
                      "add_full_attention_sink_bias": False, "moe_layer_freq": [0] + [1] * (LAYERS - 1)},
    "deepseek": {"moe_layer_freq": 1}, "exaone_moe": {"is_moe_layer": [False] + [True] * (LAYERS - 1)},
    "kimi_linear": {"linear_attn_config": {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4,
                                           "head_dim": 8, "short_conv_kernel_size": 3}},
    "nanbeige": {"num_nextn_predict_layers": 0},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layers": [1, 0] * (LAYERS // 2),
                    "use_qk_norm": False, "attn_temperature_tuning": 0},
    "internlm2": {"bias": False}, "internlm3": {"bias": False, "qkv_bias": False},
    "gemma3n": {"text_config": {
        "model_type": "gemma3n_text", "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64,
        "num_attention_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-5, "vocab_size": 128, "num_key_value_heads": 2,
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 128, "sliding_window": 8,
        "max_position_embeddings": 256, "rope_local_base_freq": 1e4, "rope_theta": 1e4,
        "final_logit_softcapping": 30.0, "layer_types": KINDS, "activation_sparsity_pattern": [0.0] * LAYERS,
        "hidden_size_per_layer_input": 8, "altup_num_inputs": 2, "altup_coef_clip": 120.0,
        "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8, "rope_scaling": None,
    }},
    "deepseek_v2": {"topk_method": "greedy", "scoring_func": "softmax", "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0,
        "beta_fast": 32, "beta_slow": 1}},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LG"},
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128,
                    "global_head_dim": 8, "num_global_key_value_heads": 2},
    "glm4_moe_lite": {"partial_rotary_factor": 1.0},
    "telechat3": {"rope_parameters": None}, "ministral3": {"rope_parameters": {
        "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 256,
        "rope_type": "default"}},
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 8},
    "longcat_flash": {"num_layers": 2}, "apertus": {"hidden_act": "xielu"},
}  # fmt: skip


BY_KIND = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}
OWN |= {
    "glm4_moe": {"rope_scaling": None}, "step3p5": {"moe_top_k": 2, "share_expert_dim": 32, "moe_num_experts": 4},
    "hunyuan": {"rope_scaling": {"type": "dynamic", "alpha": 1.0, "factor": 1.0}},
    "lille-130m": {"n_embd": 256}, "mellum": {"rope_parameters": BY_KIND},
    "spark2_5": {"rope_parameters": BY_KIND, "hidden_act": "gelu"},
    "minicpm3": {"rope_scaling": {"type": "longrope", "short_factor": 1.0, "long_factor": 1.0,
                                  "original_max_position_embeddings": 256}},
    "mistral4": {"rope_parameters": {
        "rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 256, "type": "yarn",
        "rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}},
    "olmo_hybrid": {"linear_allow_neg_eigval": True,
                    "layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)},
    "plamo": {"n_shared_head": 2}, "qwen": {"kv_channels": 8},
    "nemotron-nas": {"block_configs": [{
        "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2},
        "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 2.0}}] * LAYERS},
}  # fmt: skip
OWN["llama4_text"] |= {"attention_chunk_size": 8, "rope_scaling": None, "num_experts_per_tok": 1}

# models that wrap a text model, and the type of that
WRAPPED = {
    "gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_text", "kimi_vl": "deepseek_v3",
    "kimi_k25": "deepseek_v3", "mistral3": "ministral3", "pixtral": "llama", "llava": "llama", "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3", "qwen3_vl_moe": "qwen3_moe", "qwen3_5": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe", "llama4": "llama4_text", "lfm2-vl": "lfm2", "deepseek_v41": "deepseek_v41_text",
    "minimax_m3_vl": "minimax", "prism_hadamard_qwen35": "qwen3_5", "muse_glimmer": "muse_spark",
}  # fmt: skip


def config(model_type: str) -> dict[str, Any]:
    """A config.json for a small model of this type."""
    made = {**SMALL, **OWN.get(model_type, {}), "model_type": model_type}
    if model_type in WRAPPED:
        inner = WRAPPED[model_type]
        made["text_config"] = {**SMALL, **OWN.get(inner, {}), "model_type": inner}
    return made
