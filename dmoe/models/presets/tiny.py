"""Models that train on a laptop's CPU in minutes."""

from dataclasses import replace

from dmoe.config import ModelConfig, MoEConfig

TINY_MOE = ModelConfig(
    vocab_size=2048,
    hidden_size=128,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    qk_norm="head",
    intermediate_size=384,
    moe=MoEConfig(intermediate_size=192, num_experts=8, top_k=2),
)

# Equal active parameters per token: one dense network as wide as the two chosen experts.
TINY_DENSE = replace(TINY_MOE, moe_layer_freq=0)
