"""OLMoE (Muennighoff et al., arXiv:2409.02060), from the config.json of allenai/OLMoE-1B-7B-0924."""

from dmoe.config import ModelConfig, MoEConfig

OLMOE_1B_7B = ModelConfig(
    vocab_size=50304,
    hidden_size=2048,
    num_layers=16,
    num_heads=16,
    num_kv_heads=16,
    head_dim=128,
    qk_norm="full",
    rope_theta=10000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    intermediate_size=1024,
    max_seq_len=4096,
    # The paper's weight 0.01 is on the mean over the 16 layers, 0.001 on the z-loss of each layer.
    moe=MoEConfig(
        intermediate_size=1024,
        num_experts=64,
        top_k=8,
        norm_topk_prob=False,
        aux_loss_coef=0.01 / 16,
        z_loss_coef=0.001,
    ),
)
