"""Llama 4 (Meta), the text model, from the config.json of meta-llama/Llama-4-Maverick-17B-128E."""

from dmoe.config import ModelConfig, MoEConfig
from dmoe.config.attention import RopeConfig

_LAYERS = range(48)

LLAMA_4_MAVERICK = ModelConfig(
    vocab_size=202048,
    hidden_size=5120,
    num_layers=len(_LAYERS),
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    qk_norm="none",
    attention_window=8192,
    layer_attention=tuple("full" if i % 4 == 3 else "chunked" for i in _LAYERS),
    layer_rope=tuple(int(i % 4 != 3) for i in _LAYERS),
    attention_temperature_scale=0.1,
    attention_temperature_floor=8192,
    rope_theta=5e5,
    rope=RopeConfig(interleaved=True),
    norm_eps=1e-5,
    tie_embeddings=False,
    intermediate_size=16384,
    moe_layer_pattern=tuple(i % 2 for i in _LAYERS),
    max_seq_len=1048576,
    # The published 0.001 weighs one loss over all layers that is top_k times ours; ours is added in each of 24 layers.
    moe=MoEConfig(
        intermediate_size=8192,
        num_experts=128,
        top_k=1,
        score_function="sigmoid",
        norm_topk_prob=False,
        weigh_input=True,
        shared_intermediate_size=8192,
        aux_loss_coef=0.001 / 24,
        z_loss_coef=0.0,
    ),
)
