"""Qwen2-MoE and Qwen1.5-MoE (Yang et al., arXiv:2407.10671): a gated shared expert, biases in attention."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, qwen
from dmoe.checkpoint.formats.families.layers import layer_types, window, window_fields
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.config import ModelConfig

MODEL_TYPES = ("qwen2_moe",)
ALLOWED = {
    "qkv_bias": fit.BOTH,
    "layer_attention": (("full",), ("sliding",), ("full", "sliding")),
    "rope.scaling": fit.SCALINGS,
    "moe_layer_freq": fit.ANY,
    "moe.activation": fit.ACTIVATIONS,
    "moe.norm_topk_prob": fit.BOTH,
    "moe.shared_intermediate_size": fit.ANY,
    "moe.shared_expert_gate": (True,),
}

mapping = qwen.mapping


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    js.check_neutral(hf)
    sizes = js.sizes(hf, kv_heads=16)
    num_layers = sizes["num_layers"]
    shared = js.value(hf, "shared_expert_intermediate_size", 5632)
    return ModelConfig(
        **sizes,
        **rope_fields(hf, head_dim=sizes["head_dim"]),
        **_window_fields(hf, num_layers),
        **qwen.network_fields(hf, num_layers, shared_intermediate_size=shared, shared_expert_gate=True),
        qkv_bias=js.value(hf, "qkv_bias", True),
    )


def _window_fields(hf: js.Json, num_layers: int) -> js.Json:
    """Without layer_types, every other layer of the first max_window_layers has the window, if it is used."""
    used, first = js.value(hf, "use_sliding_window", False), js.value(hf, "max_window_layers", 28)
    types = hf.get("layer_types")
    if types is None:
        sliding = [used and i % 2 == 0 and i < first for i in range(num_layers)]
        types = ["sliding_attention" if slides else "full_attention" for slides in sliding]
    return window_fields(hf.get("sliding_window", 4096) if used else None, types, num_layers, "sliding_window")


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    return fit.misfits(config, ALLOWED) + fit.silu_if_dense(config)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "qwen2_moe")
    return (
        js.base(config, "qwen2_moe", "Qwen2MoeForCausalLM")
        | qwen.network_keys(config)
        | js.head_dim_if_unusual(config)
        | {
            "shared_expert_intermediate_size": config.moe.shared_intermediate_size,
            "qkv_bias": config.qkv_bias,
            "rope_parameters": rope_parameters(config),
            "use_sliding_window": window(config) is not None,
            "sliding_window": window(config),
            "layer_types": layer_types(config),
        }
    )
