"""DeepSeek-V2 (arXiv:2405.04434) and V3 (arXiv:2412.19437), from the config.json of deepseek-ai/DeepSeek-V2,
DeepSeek-V2-Lite and DeepSeek-V3; the weights of the losses are the papers'.

V3's layer that predicts a second token is left out.
"""

from dataclasses import replace

from dmoe.config import ModelConfig, MoEConfig
from dmoe.config.attention import LatentAttentionConfig, RopeConfig

DEEPSEEK_V2_LITE = ModelConfig(
    vocab_size=102400,
    hidden_size=2048,
    num_layers=27,
    num_heads=16,
    num_kv_heads=16,
    head_dim=192,
    qk_norm="none",
    rope_theta=10000.0,
    rope=RopeConfig(
        scaling="yarn",
        interleaved=True,
        factor=40.0,
        original_max_seq_len=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=0.707,
        mscale_all_dim=0.707,
    ),
    latent=LatentAttentionConfig(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
    norm_eps=1e-6,
    tie_embeddings=False,
    intermediate_size=10944,
    first_k_dense=1,
    max_seq_len=163840,
    moe=MoEConfig(
        intermediate_size=1408,
        num_experts=64,
        top_k=6,
        norm_topk_prob=False,
        shared_intermediate_size=2 * 1408,
        aux_loss_coef=0.0,
        seq_aux_loss_coef=0.001,
        z_loss_coef=0.0,
    ),
)

DEEPSEEK_V2 = replace(
    DEEPSEEK_V2_LITE,
    hidden_size=5120,
    num_layers=60,
    num_heads=128,
    num_kv_heads=128,
    latent=replace(DEEPSEEK_V2_LITE.latent, q_lora_rank=1536),
    intermediate_size=12288,
    moe=replace(
        DEEPSEEK_V2_LITE.moe,
        intermediate_size=1536,
        num_experts=160,
        shared_intermediate_size=2 * 1536,
        routed_scaling_factor=16.0,
        n_group=8,
        topk_group=3,
        group_score_top=1,
        seq_aux_loss_coef=0.003,
    ),
)

DEEPSEEK_V3 = replace(
    DEEPSEEK_V2,
    vocab_size=129280,
    hidden_size=7168,
    num_layers=61,
    rope=replace(DEEPSEEK_V2.rope, mscale=1.0, mscale_all_dim=1.0),
    intermediate_size=18432,
    first_k_dense=3,
    moe=replace(
        DEEPSEEK_V2.moe,
        intermediate_size=2048,
        num_experts=256,
        top_k=8,
        score_function="sigmoid",
        norm_topk_prob=True,
        shared_intermediate_size=2048,
        routed_scaling_factor=2.5,
        topk_group=4,
        group_score_top=2,
        expert_bias_rate=0.001,
        seq_aux_loss_coef=0.0001,
    ),
)
