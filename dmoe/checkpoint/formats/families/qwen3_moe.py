"""Qwen3-MoE (Qwen team, arXiv:2505.09388): a norm over each head's queries and keys."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, qwen
from dmoe.checkpoint.formats.families.layers import window, window_fields
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.config import ModelConfig

MODEL_TYPES = ("qwen3_moe",)
ALLOWED = {
    "qk_norm": ("head",),
    "qkv_bias": fit.BOTH,
    "attention_out_bias": fit.BOTH,
    "layer_attention": (("full",), ("sliding",)),
    "rope.scaling": fit.SCALINGS,
    "moe_layer_freq": fit.ANY,
    "moe.activation": fit.ACTIVATIONS,
    "moe.norm_topk_prob": fit.BOTH,
}

mapping = qwen.mapping


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    js.check_neutral(hf)
    js.refuse_layer_types(hf)
    sizes = js.sizes(hf, kv_heads=4) | {"qk_norm": "head"}
    bias = js.value(hf, "attention_bias", False)
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    return ModelConfig(
        **sizes,
        **rope_fields(hf, head_dim=sizes["head_dim"]),
        **window_fields(window, None, sizes["num_layers"], "sliding_window"),
        **qwen.network_fields(hf, sizes["num_layers"]),
        qkv_bias=bias,
        attention_out_bias=bias,
    )


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    return fit.misfits(config, ALLOWED) + fit.same_biases(config) + fit.silu_if_dense(config)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "qwen3_moe")
    return (
        js.base(config, "qwen3_moe", "Qwen3MoeForCausalLM")
        | qwen.network_keys(config)
        | {
            "head_dim": config.head_dim,
            "attention_bias": config.qkv_bias,
            "rope_parameters": rope_parameters(config),
            "use_sliding_window": window(config) is not None,
            "sliding_window": window(config),
        }
    )
