"""OLMoE (Muennighoff et al., arXiv:2409.02060): norms over all heads at once, weights that need not sum to 1."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, tensors
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.checkpoint.formats.mapping import Stored
from dmoe.config import ModelConfig, MoEConfig

MODEL_TYPES = ("olmoe",)
ALLOWED = {
    "qk_norm": ("full",),
    "clip_qkv": fit.ANY,
    "qkv_bias": fit.BOTH,
    "attention_out_bias": fit.BOTH,
    "rope.scaling": fit.SCALINGS,
    "moe.activation": fit.ACTIVATIONS,
    "moe.norm_topk_prob": fit.BOTH,
}


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    js.check_neutral(hf, sliding_window=(None,))
    js.refuse_layer_types(hf)
    sizes = js.sizes(hf, eps=1e-5) | {"qk_norm": "full"}
    bias, width = js.value(hf, "attention_bias", False), js.needed(hf, "intermediate_size")
    if sizes["num_heads"] * sizes["head_dim"] != sizes["hidden_size"]:
        js.refuse_others(hf, "head_dim", (sizes["hidden_size"] // sizes["num_heads"],))
    return ModelConfig(
        **sizes,
        **rope_fields(hf, head_dim=sizes["head_dim"]),
        clip_qkv=js.number(hf, "clip_qkv", 0.0),
        qkv_bias=bias,
        attention_out_bias=bias,
        intermediate_size=width,
        moe=MoEConfig(
            intermediate_size=width,
            num_experts=js.needed(hf, "num_experts", "num_local_experts"),
            top_k=js.value(hf, "num_experts_per_tok", 8),
            activation=js.activation(hf),
            norm_topk_prob=js.value(hf, "norm_topk_prob", False),
            # In the paper this weighs the mean of the layers' losses, each 1 at equal load.
            aux_loss_coef=js.loss_per_layer(js.number(hf, "router_aux_loss_coef", 0.01), 1, sizes["num_layers"]),
            z_loss_coef=0.0,
        ),
    )


def _width(config: ModelConfig) -> list[fit.Misfit]:
    """The norms are as wide as the model."""
    fits = config.num_heads * config.head_dim == config.hidden_size
    return fit.unless(fits, "model.head_dim", config.head_dim, f"hidden_size / {config.num_heads} heads")


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    return fit.misfits(config, ALLOWED) + fit.same_biases(config) + _width(config)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "olmoe")
    moe = config.moe
    return js.base(config, "olmoe", "OlmoeForCausalLM") | {
        "hidden_act": js.HIDDEN_ACT[moe.activation],
        "intermediate_size": moe.intermediate_size,
        "attention_bias": config.qkv_bias,
        "clip_qkv": config.clip_qkv or None,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_topk_prob or moe.softmax_after_topk,
        "output_router_logits": False,
        "router_aux_loss_coef": js.loss_over_layers(moe.aux_loss_coef, 1, config.num_layers),
        "rope_parameters": rope_parameters(config),
    }


def mapping(config: ModelConfig, fused: bool = False) -> list[Stored]:
    """The stored tensors; `fused`: as transformers 5 has them in memory."""

    def layer_mlp(_: int, stored: str, ours: str) -> list[Stored]:
        experts = tensors.experts_in(config, f"{stored}.mlp.experts", f"{ours}.mlp.experts", fused)
        return [tensors.router(config, f"{stored}.mlp.gate.weight", f"{ours}.mlp"), *experts]

    return tensors.model(config, layer_mlp)
