"""Mistral 7B (Jiang et al., arXiv:2310.06825), from the config.json of mistralai/Mistral-7B-v0.1."""

from dmoe.config import ModelConfig

MISTRAL_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    qk_norm="none",
    attention_window=4096,
    rope_theta=10000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    intermediate_size=14336,
    moe_layer_freq=0,
    max_seq_len=32768,
)
