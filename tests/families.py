"""The configurations of the tiny models of tiny.py, one entry a family: what differs from COMMON."""

from __future__ import annotations

from typing import Any

VOCABULARY = 512
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "float32",
}
_GEMMA = {"head_dim": 8, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
_MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "moe_layer_freq": 1,
}  # fmt: skip
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_SIGMOID = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
_SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_GROUPS = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True}
_CONV = {"conv_L_cache": 3, "conv_bias": False, "norm_eps": 1e-5, "layer_types": ["conv", "full_attention"]}
_STATE = {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4, "expand": 2}
_MAMBA2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_n_groups": 1,
    "mamba_expand": 2, "mamba_chunk_size": 8, "mamba_conv_bias": True, "mamba_proj_bias": False,
    "time_step_limit": [0.0, 100.0],
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "mlp_bias": False},
    "mistral": {"architectures": ["MistralForCausalLM"], "head_dim": 8, "sliding_window": None},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True, "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 8, "tie_word_embeddings": True},
    "gemma": {"architectures": ["GemmaForCausalLM"], **_GEMMA},
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"], **_GEMMA, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8, "sliding_window": 512,
    },
    "gemma3_text": {
        "architectures": ["Gemma3ForCausalLM"], **_GEMMA, "query_pre_attn_scalar": 8, "sliding_window": 16,
        "sliding_window_pattern": 2, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
    },
    "phi3": {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 512,
    "partial_rotary_factor": 1.0},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": False,
    },
    "olmo2": {"architectures": ["Olmo2ForCausalLM"]},
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"], **_MLA, "topk_method": "greedy", "norm_topk_prob": False,
        "head_dim": 8,
        "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32, "beta_slow": 1,
        },
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"], **_MLA, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True,
    },
    "gpt_oss": {
        "architectures": ["GptOssForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "attention_bias": True,
    },
    "cohere": {
        "architectures": ["CohereForCausalLM"], "logit_scale": 0.25, "tie_word_embeddings": True,
        "layer_norm_eps": 1e-5,
        "use_qk_norm": False,
    },
    "granite": {
        "architectures": ["GraniteForCausalLM"], "logits_scaling": 2.0, "attention_multiplier": 0.35,
        "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "mlp_bias": False,
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0], "no_rope_layer_interval": 2,
        "mlp_bias": False,
        "use_sliding_window": False,
    },
    "stablelm": {
        "architectures": ["StableLmForCausalLM"], "use_qkv_bias": False, "partial_rotary_factor": 0.25,
        "layer_norm_eps": 1e-5, "use_parallel_residual": False, "qk_layernorm": False,
    },
    "starcoder2": {
        "architectures": ["Starcoder2ForCausalLM"], "norm_epsilon": 1e-5, "use_bias": True, "tie_word_embeddings": True,
        "sliding_window": None,
    },
    "ernie4_5": {"architectures": ["Ernie4_5ForCausalLM"], "use_bias": False, "head_dim": 8},
    "exaone4": {
        "architectures": ["Exaone4ForCausalLM"], "head_dim": 8, "sliding_window": 64, "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"], "rope_scaling": None,
    },
    "helium": {"architectures": ["HeliumForCausalLM"], "head_dim": 8, "mlp_bias": False},
    "nemotron": {
        "architectures": ["NemotronForCausalLM"], "head_dim": 8, "partial_rotary_factor": 0.5, "norm_eps": 1e-5,
        "hidden_act": "relu2", "mlp_bias": False,
    },
    "phi": {"architectures": ["PhiForCausalLM"], "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "phimoe": {
        "architectures": ["PhimoeForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2, "lm_head_bias": True,
        "attention_bias": True,
    },
    "seed_oss": {"architectures": ["SeedOssForCausalLM"], "head_dim": 8},
    "granitemoe": {
        "architectures": ["GraniteMoeForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
        "logits_scaling": 2.0, "attention_multiplier": 0.35, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    },
    "dots1": {
        "architectures": ["Dots1ForCausalLM"], "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "use_qk_norm": True,
        "scoring_func": "noaux_tc", "moe_layer_freq": 1,
    },
    "glm4_moe": {
        "architectures": ["Glm4MoeForCausalLM"], "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "partial_rotary_factor": 0.5,
        "use_qk_norm": False, "rope_scaling": None,
    },
    "gpt_neox": {
        "architectures": ["GPTNeoXForCausalLM"], "attention_bias": True, "rotary_pct": 0.25, "rotary_emb_base": 10000,
        "layer_norm_eps": 1e-5, "use_parallel_residual": True, "intermediate_size": 128,
    },
    "glm4": {
        "architectures": ["Glm4ForCausalLM"], "head_dim": 8, "partial_rotary_factor": 0.5,
    },
    "glm": {"architectures": ["GlmForCausalLM"], "head_dim": 8, "partial_rotary_factor": 1.0},
    "cohere2": {
        "architectures": ["Cohere2ForCausalLM"], "head_dim": 8, "logit_scale": 0.25, "layer_norm_eps": 1e-5,
        "num_hidden_layers": 4, "sliding_window": 16, "sliding_window_pattern": 4, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    },
    "olmo3": {"architectures": ["Olmo3ForCausalLM"], **_SLIDING, "rope_theta": 500000.0},
    "ministral3": {
        "architectures": ["Ministral3ForCausalLM"], "head_dim": 8, "layer_types": ["full_attention", "full_attention"],
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
            "llama_4_scaling_beta": 0.1, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "hunyuan_v1_dense": {
        "architectures": ["HunYuanDenseV1ForCausalLM"], "head_dim": 8, "use_qk_norm": True,
        "rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "alpha": 1.0, "factor": 1.0},
    },
    "apertus": {
        "architectures": ["ApertusForCausalLM"], "hidden_act": "xielu", "mlp_bias": False, "post_norm": False,
        "qk_norm": True,
    },
    "solar_open": {
        "architectures": ["SolarOpenForCausalLM"], "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 0, "use_qk_norm": False,
        "partial_rotary_factor": 1.0, **_GROUPS,
    },
    "exaone_moe": {
        "architectures": ["ExaoneMoeForCausalLM"], "head_dim": 8, **_MOE, **_SLIDING, **_SIGMOID, **_GROUPS,
        "num_shared_experts": 1, "sliding_window_pattern": "LG", "is_moe_layer": [False, True],
        "mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1, "first_last_k_dense_replace": 1,
    },
    "glm4_moe_lite": {
        "architectures": ["Glm4MoeLiteForCausalLM"], **_MLA, **_SIGMOID, "head_dim": 8, "rope_interleave": True,
        "mlp_layer_types": ["dense", "sparse"],
    },
    "deepseek_v32": {
        "architectures": ["DeepseekV32ForCausalLM"], **_MLA, **_SIGMOID, "rope_interleave": True, "index_n_heads": 2,
        "index_head_dim": 16, "index_topk": 256,
    },
    "glm_moe_dsa": {
        "architectures": ["GlmMoeDsaForCausalLM"], **_MLA, **_SIGMOID, "rope_interleave": True, "index_n_heads": 2,
        "index_head_dim": 16, "index_topk": 256,
    },
    "afmoe": {
        "architectures": ["AfmoeForCausalLM"], "head_dim": 8, **_MOE, **_SLIDING, "num_dense_layers": 1,
        "num_shared_experts": 1, "route_norm": True, "route_scale": 1.0, "score_func": "sigmoid", "n_group": 1,
        "topk_group": 1, "mup_enabled": True, "global_attn_every_n_layers": 2, "num_expert_groups": 1,
        "num_limited_groups": 1,
    },
    "gemma4_text": {
        "architectures": ["Gemma4ForCausalLM"], **_GEMMA, **_SLIDING, "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "final_logit_softcapping": 30.0,
        "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32,
        "use_double_wide_mlp": False, "attention_k_eq_v": True, "global_head_dim": 16, "num_global_key_value_heads": 1,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "qwen3_next": {
        "architectures": ["Qwen3NextForCausalLM"], "head_dim": 8, **_MOE, "shared_expert_intermediate_size": 32,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "partial_rotary_factor": 0.5,
        "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_conv_kernel_dim": 4,
    },
    "nemotron_h": {
        "architectures": ["NemotronHForCausalLM"], **_GROUPS, "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 1, "conv_kernel": 4, "use_conv_bias": True, "mlp_bias": False,
        "use_bias": False, "chunk_size": 8, "head_dim": 8, "layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2",
        "mamba_proj_bias": False, "time_step_limit": [0.0, 100.0], "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 32,
    },
    "lfm2": {
        "architectures": ["Lfm2ForCausalLM"], **_CONV, "block_dim": 32, "block_ff_dim": 64, "block_multiple_of": 8,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "full_attn_idxs": [1],
        "tie_word_embeddings": True,
    },
    "lfm2_moe": {
        "architectures": ["Lfm2MoeForCausalLM"], **_CONV, **_MOE, "num_dense_layers": 1, "use_expert_bias": True,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "tie_word_embeddings": True,
    },
    "mamba": {
        "architectures": ["MambaForCausalLM"], **_STATE, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "mamba2": {
        "architectures": ["Mamba2ForCausalLM"], **_STATE, "num_heads": 8, "head_dim": 8, "n_groups": 1,
        "layer_norm_epsilon": 1e-5, "chunk_size": 8, "time_step_limit": [0.0, 100.0], "tie_word_embeddings": True,
    },
    "gptj": {
        "architectures": ["GPTJForCausalLM"], "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512,
        "rotary_dim": 4, "layer_norm_epsilon": 1e-5,
    },
    "gpt_bigcode": {
        "architectures": ["GPTBigCodeForCausalLM"], "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512,
        "n_inner": 64, "multi_query": True, "layer_norm_epsilon": 1e-5, "attention_bias": True, "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "granitemoehybrid": {
        "architectures": ["GraniteMoeHybridForCausalLM"], **_MAMBA2, "layer_types": ["mamba", "attention"],
        "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 32, "logits_scaling": 2.0,
        "attention_multiplier": 0.35, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "position_embedding_type": "rope",
    },
    "jamba": {
        "architectures": ["JambaForCausalLM"], "num_experts": 2, "num_experts_per_tok": 2, "attn_layer_offset": 1,
        "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_state": 8,
        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 4, "mamba_conv_bias": True, "mamba_proj_bias": False,
    },
    "falcon_h1": {
        "architectures": ["FalconH1ForCausalLM"], **_MAMBA2, "head_dim": 8, "mamba_d_ssm": 64,
        "mamba_norm_before_gate": False, "mamba_rms_norm": True, "projectors_bias": False, "mlp_bias": False,
        "lm_head_multiplier": 0.5, "embedding_multiplier": 5.6, "mlp_multipliers": [0.9, 0.3], "key_multiplier": 1.0,
        "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375, "ssm_in_multiplier": 1.25,
        "ssm_multipliers": [0.35, 0.25, 0.17, 0.5, 0.3], "ssm_out_multiplier": 0.23,
    },
    "ernie4_5_moe": {
        "architectures": ["Ernie4_5_MoeForCausalLM"], "use_bias": False, "head_dim": 8, "moe_num_experts": 4,
        "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
        "moe_layer_end_index": -1, "moe_layer_interval": 1,
    },
    "mellum": {
        "architectures": ["MellumForCausalLM"], "head_dim": 8, **_MOE, **_SLIDING, "norm_topk_prob": True,
        "mlp_layer_types": ["sparse", "sparse"], "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "recurrent_gemma": {
        "architectures": ["RecurrentGemmaForCausalLM"], "num_hidden_layers": 3, "lru_width": 32, "head_dim": 8,
        "attention_window_size": 64, "block_types": ["recurrent", "recurrent", "attention"], "logits_soft_cap": 30.0,
        "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "conv1d_width": 4,
        "num_key_value_heads": 1, "partial_rotary_factor": 0.5, "embeddings_scale_by_sqrt_dim": True,
    },
    "minimax_m2": {
        "architectures": ["MiniMaxM2ForCausalLM"], "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rotary_dim": 4, "shared_intermediate_size": 0, "use_qk_norm": True, "scoring_func": "sigmoid",
    },
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_ctx": 512, "n_embd": 32, "n_head": 4, "n_layer": 2,
    "n_positions": 512, "layer_norm_epsilon": 1e-5, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 2,
    "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip

# architectures whose config.json never says one
NO_THETA = ("gptj", "gpt_bigcode", "jamba", "mamba", "mamba2", "mellum", "nemotron_h")
