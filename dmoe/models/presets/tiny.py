"""Models that train on a laptop's CPU in minutes."""

from dataclasses import replace

from dmoe.config import ModelConfig, MoEConfig

TINY_MOE = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    qk_norm="head",
    intermediate_size=768,
    moe=MoEConfig(intermediate_size=384, num_experts=8, top_k=2),
)

# Equal active parameters per token: one dense network as wide as the two chosen experts.
TINY_DENSE = replace(TINY_MOE, moe_layer_freq=0)
