"""config.json of published models, in older words and without what has no part in the maths; their size."""

from typing import Any

LLAMA3_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
DEEPSEEK_ROPE = {
    "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn",
}  # fmt: skip
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "initializer_range": 0.02, "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss",
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_key_value_heads": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "use_cache": True, "vocab_size": 201088,
}  # fmt: skip

PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "llama-2-70b": (
        {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 8192, "intermediate_size": 28672,
            "max_position_embeddings": 4096, "num_attention_heads": 64, "num_hidden_layers": 80,
            "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        68_976_648_192,
    ),
    "llama-3-8b": (
        {
            "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
            "tie_word_embeddings": False, "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "llama-3.1-405b": (
        {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 16384, "intermediate_size": 53248,
            "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 128, "num_hidden_layers": 126,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0,
            "tie_word_embeddings": False, "vocab_size": 128256,
        },
        405_853_388_800,
    ),
    "llama-3.2-1b": (
        {
            "model_type": "llama", "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": LLAMA3_ROPE | {"factor": 32.0},
            "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
        },
        1_235_814_400,
    ),
    "mistral-7b": (
        {
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        7_241_732_096,
    ),
    "mixtral-8x22b": (
        {
            "model_type": "mixtral", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 6144,
            "intermediate_size": 16384, "max_position_embeddings": 65536, "num_attention_heads": 48,
            "num_experts_per_tok": 2, "num_hidden_layers": 56, "num_key_value_heads": 8, "num_local_experts": 8,
            "output_router_logits": False, "rms_norm_eps": 1e-05, "rope_theta": 1000000, "router_aux_loss_coef": 0.001,
            "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
        },
        140_620_634_112,
    ),
    "qwen1.5-moe-a2.7b": (
        {
            "model_type": "qwen2_moe", "attention_dropout": 0.0, "decoder_sparse_step": 1, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 8192, "max_window_layers": 21,
            "moe_intermediate_size": 1408, "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 60,
            "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 16, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768, "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        14_315_784_192,
    ),
    "qwen3-235b-a22b": (
        {
            "model_type": "qwen3_moe", "attention_bias": False, "attention_dropout": 0.0, "decoder_sparse_step": 1,
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288,
            "max_position_embeddings": 40960, "max_window_layers": 94, "mlp_only_layers": [],
            "moe_intermediate_size": 1536, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts": 128,
            "num_experts_per_tok": 8, "num_hidden_layers": 94, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
            "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        235_093_634_560,
    ),
    "deepseek-v2-lite": (
        {
            "model_type": "deepseek_v2", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
            "first_k_dense_replace": 1, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944,
            "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1,
            "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False,
            "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
            "pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-06, "rope_scaling": DEEPSEEK_ROPE, "rope_theta": 10000, "routed_scaling_factor": 1.0,
            "scoring_func": "softmax", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 1,
            "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
        },
        15_706_484_224,
    ),
    "deepseek-v3": (
        {
            "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.0001,
            "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
            "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
            "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536,
            "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
            "rope_scaling": DEEPSEEK_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 10000,
            "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False,
            "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
        },
        671_026_404_352,
    ),
    "gpt-oss-20b": (
        GPT_OSS | {
            "num_hidden_layers": 24, "num_local_experts": 32,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
        },
        20_914_757_184,
    ),
    "gpt-oss-120b": (GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128}, 116_829_156_672),
    "granite-3.0-1b-a400m": (
        {
            "model_type": "granitemoe", "attention_bias": False, "attention_dropout": 0.0,
            "attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 1024,
            "intermediate_size": 512, "logits_scaling": 6.0, "max_position_embeddings": 4096, "num_attention_heads": 16,
            "num_experts_per_tok": 8, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
            "residual_multiplier": 0.22, "rms_norm_eps": 1e-06, "rope_theta": 10000, "router_aux_loss_coef": 0.0,
            "tie_word_embeddings": True, "vocab_size": 49155,
        },
        1_334_628_352,
    ),
}  # fmt: skip
