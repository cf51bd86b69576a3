"""Megatron's arguments as our configuration and back, and what either cannot express."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from dmoe.checkpoint.formats.megatron import flags
from dmoe.config import ModelConfig, MoEConfig
from dmoe.config.attention import LatentAttentionConfig, RopeConfig
from dmoe.errors import ConfigError

sys.path.insert(0, str(Path(__file__).parent))
from formats_megatron_cases import BASE, CONFIGS, MOE, same_model


@pytest.mark.parametrize(
    ("model", "moe", "message"),
    [
        ({"qk_norm": "full"}, {}, "model.qk_norm is 'full': must be 'none' or 'head' for Megatron"),
        ({"clip_qkv": 8.0}, {}, "model.clip_qkv is 8.0"),
        ({"attention_sinks": True}, {}, "model.attention_sinks"),
        ({"norm": "layer"}, {}, "model.norm is 'layer'"),
        ({"layer_rope": (1, 0)}, {}, "model.layer_rope"),
        ({"attention_window": 8, "layer_attention": ("full", "sliding")}, {}, "model.layer_attention"),
        ({"rope": RopeConfig(scaling="yarn", factor=4.0)}, {}, "model.rope.scaling is 'yarn'"),
        ({"rope": RopeConfig(scaling="llama3", factor=8.0)}, {}, "original_max_seq_len is 64: must be 8192"),
        ({"latent": LatentAttentionConfig(kv_lora_rank=8)}, {}, "model.latent.kv_lora_rank is 8"),
        ({"residual_multiplier": 0.5}, {}, "model.residual_multiplier"),
        ({}, {"activation": "gelu"}, "model.moe.activation is 'gelu'"),
        ({}, {"bias": True}, "model.moe.bias"),
        ({}, {"weigh_input": True}, "model.moe.weigh_input"),
        ({}, {"top_k": 1}, "model.moe.norm_topk_prob is True"),
        ({}, {"score_function": "sigmoid", "norm_topk_prob": False}, "model.moe.norm_topk_prob is False"),
        ({}, {"n_group": 3, "topk_group": 2, "top_k": 4}, "model.moe.norm_topk_prob is True"),
        ({}, {"n_group": 3, "topk_group": 2, "top_k": 4, "norm_topk_prob": False, "group_score_top": 1}, "group_score"),
    ],
)
def test_models_that_megatron_does_not_compute(model: Any, moe: Any, message: str, tmp_path: Path):
    config = ModelConfig(**BASE | model, moe=MoEConfig(**MOE | moe))
    with pytest.raises(ConfigError, match=message):
        flags.to_args(config)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"multi_latent_attention": True}, "multi_latent_attention is True: must be False"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm': must be 'RMSNorm'"),
        (
            {"position_embedding_type": "learned_absolute", "use_rotary_position_embeddings": False},
            "position_embedding",
        ),
        ({"swiglu": False}, "swiglu"),
        ({"mtp_num_layers": 1}, "mtp_num_layers is 1"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "sinkhorn"),
        ({"window_size": (8, 8)}, "window_size"),
        ({"num_layers": None}, "num_layers is None"),
        ({"vocab_size": 100, "padded_vocab_size": 64}, "vocab_size is 100: must be at most"),
    ],
)
def test_arguments_that_are_not_ours(args: dict[str, Any], message: str):
    good = flags.to_args(CONFIGS["mixtral"]) | {"padded_vocab_size": 64}
    with pytest.raises(ConfigError, match=message):
        flags.from_args(good | args)


@pytest.mark.parametrize(
    "change",
    [
        {"rope": RopeConfig(scaling="llama3", factor=8.0, original_max_seq_len=8192), "max_seq_len": 131072},
        {"rope": RopeConfig(scaling="linear", factor=2.0)},
        {"rope": RopeConfig(interleaved=True, fraction=0.5)},
        {"attention_window": 16},
        {"init_std": 0.01, "rope_theta": 5e5},
    ],
)
def test_arguments_both_ways(change: dict[str, Any]):
    config = ModelConfig(**BASE | change, moe=MoEConfig(**MOE))
    assert same_model(flags.from_args(flags.to_args(config) | {"vocab_size": 50}), config)


def test_arguments_of_an_older_run():
    """Without fields that came later, with Megatron's defaults where it has None."""
    args = {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 1,
        "group_query_attention": False, "max_position_embeddings": 128, "swiglu": True, "normalization": "RMSNorm",
        "add_bias_linear": False, "position_embedding_type": "learned_absolute", "use_rotary_position_embeddings": True,
        "untie_embeddings_and_output_weights": True, "padded_vocab_size": 256, "num_experts": 4, "moe_router_topk": 2,
        "moe_aux_loss_coeff": 0.01, "moe_router_load_balancing_type": "aux_loss",
    }  # fmt: skip
    config = flags.from_args(args)
    assert (config.num_kv_heads, config.head_dim, config.vocab_size, config.moe.intermediate_size) == (4, 16, 256, 96)
    assert (config.norm_eps, config.rope_theta, config.moe.aux_loss_coef) == (1e-5, 10000.0, 0.01)
    assert flags.from_args(args, vocab_size=250).vocab_size == 250


def test_flags_that_the_trainer_needs():
    assert flags.launch_flags(CONFIGS["llama"]) == []
    assert flags.launch_flags(CONFIGS["qwen3"]) == [
        "--qk-layernorm", "--moe-router-dtype", "fp32", "--moe-z-loss-coeff", "0.001",
    ]  # fmt: skip
    windowed = dataclasses.replace(CONFIGS["llama"], attention_window=8, norm_eps=1e-6)
    assert flags.launch_flags(windowed) == ["--norm-epsilon", "1e-06", "--window-size", "(7,0)"]
