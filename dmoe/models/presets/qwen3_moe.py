"""Qwen3-MoE (Qwen team, arXiv:2505.09388), from the config.json of Qwen/Qwen3-30B-A3B and Qwen/Qwen3-235B-A22B."""

from dataclasses import replace

from dmoe.config import ModelConfig, MoEConfig

QWEN3_30B_A3B = ModelConfig(
    vocab_size=151936,
    hidden_size=2048,
    num_layers=48,
    num_heads=32,
    num_kv_heads=4,
    head_dim=128,
    qk_norm="head",
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=False,
    intermediate_size=6144,
    max_seq_len=40960,
    # The published 0.001 weighs one loss over all layers that is top_k times ours; ours is added in each of 48 layers.
    moe=MoEConfig(intermediate_size=768, num_experts=128, top_k=8, aux_loss_coef=0.001 * 8 / 48, z_loss_coef=0.0),
)

QWEN3_235B_A22B = replace(
    QWEN3_30B_A3B,
    hidden_size=4096,
    num_layers=94,
    num_heads=64,
    intermediate_size=12288,
    moe=replace(QWEN3_30B_A3B.moe, intermediate_size=1536, aux_loss_coef=0.001 * 8 / 94),
)
