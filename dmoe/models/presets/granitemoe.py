"""Granite 3.0 MoE (IBM, 2024), from the config.json of ibm-granite/granite-3.0-1b-a400m-instruct."""

from dmoe.config import ModelConfig, MoEConfig

GRANITE_3_0_1B_A400M = ModelConfig(
    vocab_size=49155,
    hidden_size=1024,
    num_layers=24,
    num_heads=16,
    num_kv_heads=8,
    head_dim=64,
    qk_norm="none",
    attention_scale=0.015625,
    rope_theta=10000.0,
    norm_eps=1e-6,
    tie_embeddings=True,
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    logits_divisor=6.0,
    intermediate_size=512,
    max_seq_len=4096,
    moe=MoEConfig(
        intermediate_size=512, num_experts=32, top_k=8, softmax_after_topk=True, aux_loss_coef=0.0, z_loss_coef=0.0
    ),
)
