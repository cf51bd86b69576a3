"""Llama 2 (Touvron et al., arXiv:2307.09288) and Llama 3 (Grattafiori et al., arXiv:2407.21783): dense models.

From the config.json of meta-llama's repositories on Hugging Face: Llama-2-7b-hf, Llama-2-13b-hf, Llama-2-70b-hf,
Meta-Llama-3-8B, Meta-Llama-3-70B, Llama-3.1-8B, Llama-3.1-70B, Llama-3.1-405B, Llama-3.2-1B and Llama-3.2-3B.
"""

from dataclasses import replace

from dmoe.config import ModelConfig
from dmoe.config.attention import RopeConfig

LLAMA_2_7B = ModelConfig(
    vocab_size=32000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    qk_norm="none",
    rope_theta=10000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    intermediate_size=11008,
    moe_layer_freq=0,
    max_seq_len=4096,
)
LLAMA_2_13B = replace(
    LLAMA_2_7B, hidden_size=5120, num_layers=40, num_heads=40, num_kv_heads=40, intermediate_size=13824
)
LLAMA_2_70B = replace(
    LLAMA_2_7B, hidden_size=8192, num_layers=80, num_heads=64, num_kv_heads=8, intermediate_size=28672
)

LLAMA_3_8B = replace(
    LLAMA_2_7B, vocab_size=128256, num_kv_heads=8, intermediate_size=14336, rope_theta=5e5, max_seq_len=8192
)
LLAMA_3_70B = replace(LLAMA_3_8B, hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=28672)

_ROPE = RopeConfig(
    scaling="llama3", factor=8.0, original_max_seq_len=8192, low_freq_factor=1.0, high_freq_factor=4.0
)  # fmt: skip
LLAMA_3_1_8B = replace(LLAMA_3_8B, max_seq_len=131072, rope=_ROPE)
LLAMA_3_1_70B = replace(LLAMA_3_70B, max_seq_len=131072, rope=_ROPE)
LLAMA_3_1_405B = replace(
    LLAMA_3_1_8B, hidden_size=16384, num_layers=126, num_heads=128, intermediate_size=53248
)  # fmt: skip

LLAMA_3_2_1B = replace(
    LLAMA_3_1_8B,
    hidden_size=2048,
    num_layers=16,
    head_dim=64,
    intermediate_size=8192,
    tie_embeddings=True,
    rope=replace(_ROPE, factor=32.0),
)
LLAMA_3_2_3B = replace(LLAMA_3_2_1B, hidden_size=3072, num_layers=28, num_heads=24, head_dim=128)
