"""Llama 1 to 3 (Grattafiori et al., arXiv:2407.21783): dense models."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, tensors
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.checkpoint.formats.mapping import Stored
from dmoe.config import ModelConfig

MODEL_TYPES = ("llama",)
ALLOWED = {
    "qkv_bias": fit.BOTH,
    "attention_out_bias": fit.BOTH,
    "rope.scaling": fit.SCALINGS,
    "mlp_bias": fit.BOTH,
    "moe_layer_freq": (0,),
}


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    js.check_neutral(hf, sliding_window=(None,))
    js.refuse_layer_types(hf)
    js.activation(hf, only="silu")
    sizes, bias = js.sizes(hf), js.value(hf, "attention_bias", False)
    return ModelConfig(
        **sizes,
        **rope_fields(hf, head_dim=sizes["head_dim"]),
        qkv_bias=bias,
        attention_out_bias=bias,
        intermediate_size=js.needed(hf, "intermediate_size"),
        mlp_bias=js.value(hf, "mlp_bias", False),
        moe_layer_freq=0,
    )


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    return fit.misfits(config, ALLOWED) + fit.same_biases(config)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "llama")
    return js.base(config, "llama", "LlamaForCausalLM") | {
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "rope_parameters": rope_parameters(config),
    }


def mapping(config: ModelConfig, fused: bool = False) -> list[Stored]:
    """The stored tensors; there is nothing to fuse."""

    def layer_mlp(_: int, stored: str, ours: str) -> list[Stored]:
        sizes = config.hidden_size, config.intermediate_size
        return tensors.feed_forward(f"{stored}.mlp", f"{ours}.mlp", *sizes, config.mlp_bias)

    return tensors.model(config, layer_mlp)
