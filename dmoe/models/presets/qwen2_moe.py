"""Qwen1.5-MoE and Qwen2-MoE (Yang et al., arXiv:2407.10671), from the config.json of Qwen/Qwen1.5-MoE-A2.7B and
Qwen/Qwen2-57B-A14B."""

from dataclasses import replace

from dmoe.config import ModelConfig, MoEConfig

QWEN1_5_MOE_A2_7B = ModelConfig(
    vocab_size=151936,
    hidden_size=2048,
    num_layers=24,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    qk_norm="none",
    qkv_bias=True,
    rope_theta=1e6,
    norm_eps=1e-6,
    tie_embeddings=False,
    intermediate_size=5632,
    max_seq_len=8192,
    # The published 0.001 weighs one loss over all layers that is top_k times ours; ours is added in each of 24 layers.
    moe=MoEConfig(
        intermediate_size=1408,
        num_experts=60,
        top_k=4,
        norm_topk_prob=False,
        shared_intermediate_size=5632,
        shared_expert_gate=True,
        aux_loss_coef=0.001 * 4 / 24,
        z_loss_coef=0.0,
    ),
)

QWEN2_57B_A14B = replace(
    QWEN1_5_MOE_A2_7B,
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    intermediate_size=18944,
    max_seq_len=131072,
    moe=replace(
        QWEN1_5_MOE_A2_7B.moe,
        intermediate_size=2560,
        num_experts=64,
        top_k=8,
        shared_intermediate_size=20480,
        aux_loss_coef=0.001 * 8 / 28,
    ),
)
