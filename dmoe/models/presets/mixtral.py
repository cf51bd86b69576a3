"""Mixtral (Jiang et al., arXiv:2401.04088), from the config.json of mistralai/Mixtral-8x7B-v0.1 and 8x22B-v0.1."""

from dataclasses import replace

from dmoe.config import ModelConfig, MoEConfig

MIXTRAL_8X7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    qk_norm="none",
    rope_theta=1e6,
    norm_eps=1e-5,
    tie_embeddings=False,
    intermediate_size=14336,
    max_seq_len=32768,
    # The published 0.02 weighs one loss over all layers that is top_k times ours; ours is added in each of 32 layers.
    moe=MoEConfig(intermediate_size=14336, num_experts=8, top_k=2, aux_loss_coef=0.02 * 2 / 32, z_loss_coef=0.0),
)

MIXTRAL_8X22B = replace(
    MIXTRAL_8X7B,
    hidden_size=6144,
    num_layers=56,
    num_heads=48,
    intermediate_size=16384,
    max_seq_len=65536,
    moe=replace(MIXTRAL_8X7B.moe, intermediate_size=16384, aux_loss_coef=0.001 * 2 / 56),
)
