"""gpt-oss (OpenAI, arXiv:2508.10925), from the config.json of openai/gpt-oss-20b and openai/gpt-oss-120b."""

from dataclasses import replace

from dmoe.config import ModelConfig, MoEConfig
from dmoe.config.attention import RopeConfig

GPT_OSS_20B = ModelConfig(
    vocab_size=201088,
    hidden_size=2880,
    num_layers=24,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    qk_norm="none",
    qkv_bias=True,
    attention_out_bias=True,
    attention_sinks=True,
    attention_window=128,
    layer_attention=("sliding", "full") * 12,
    rope_theta=150000.0,
    rope=RopeConfig(
        scaling="yarn", factor=32.0, original_max_seq_len=4096, beta_fast=32.0, beta_slow=1.0, truncate=False
    ),
    norm_eps=1e-5,
    tie_embeddings=False,
    intermediate_size=2880,
    max_seq_len=131072,
    # The published 0.9 weighs one loss over all layers that is top_k times ours; ours is added in each of 24 layers.
    moe=MoEConfig(
        intermediate_size=2880,
        num_experts=32,
        top_k=4,
        activation="clamped_swiglu",
        bias=True,
        router_bias=True,
        softmax_after_topk=True,
        aux_loss_coef=0.9 * 4 / 24,
        z_loss_coef=0.0,
    ),
)

GPT_OSS_120B = replace(
    GPT_OSS_20B,
    num_layers=36,
    layer_attention=("sliding", "full") * 18,
    moe=replace(GPT_OSS_20B.moe, num_experts=128, aux_loss_coef=0.9 * 4 / 36),
)
