"""Mistral (Jiang et al., arXiv:2310.06825): dense models with a sliding window in every layer."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, llama
from dmoe.checkpoint.formats.families.layers import window, window_fields
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.config import ModelConfig

MODEL_TYPES = ("mistral",)
ALLOWED = {
    "layer_attention": (("full",), ("sliding",)),
    "rope.scaling": fit.SCALINGS,
    "moe_layer_freq": (0,),
}

mapping = llama.mapping


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    js.check_neutral(hf, attention_bias=(None, False), mlp_bias=(None, False))
    js.refuse_layer_types(hf)
    js.activation(hf, only="silu")
    sizes = js.sizes(hf, kv_heads=8)
    window = hf.get("sliding_window", 4096)
    return ModelConfig(
        **sizes,
        **rope_fields(hf, head_dim=sizes["head_dim"]),
        **window_fields(window, None, sizes["num_layers"], "sliding_window"),
        intermediate_size=js.needed(hf, "intermediate_size"),
        moe_layer_freq=0,
    )


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    return fit.misfits(config, ALLOWED)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "mistral")
    return js.base(config, "mistral", "MistralForCausalLM") | {
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "rope_parameters": rope_parameters(config),
        "sliding_window": window(config),
    }
