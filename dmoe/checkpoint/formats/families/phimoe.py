"""PhiMoE (Abdin et al., arXiv:2404.14219, and GRIN, arXiv:2409.12136): LayerNorm, biases, SparseMixer routing."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, tensors
from dmoe.checkpoint.formats.families.layers import window, window_fields
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.checkpoint.formats.mapping import Stored
from dmoe.config import ModelConfig, MoEConfig

MODEL_TYPES = ("phimoe",)
ALLOWED = {
    "qkv_bias": fit.BOTH,
    "attention_out_bias": fit.BOTH,
    "layer_attention": (("full",), ("sliding",)),
    "rope.scaling": ("none", "longrope"),
    "norm": ("layer",),
    "head_bias": fit.BOTH,
    "moe.activation": fit.ACTIVATIONS,
    "moe.routing": ("sparsemixer",),
}


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have.

    In training, their input_jitter_noise is on what router and experts read, twice on the former; ours is on what the
    router reads alone.
    """
    js.check_neutral(hf)
    js.refuse_layer_types(hf)
    js.refuse_others(hf, "num_experts_per_tok", (None, 2))
    sizes = js.sizes(hf, eps=1e-5, kv_heads=8)
    bias, width = js.value(hf, "attention_bias", False), js.needed(hf, "intermediate_size")
    return ModelConfig(
        **sizes,
        **rope_fields(hf, theta=1e6, head_dim=sizes["head_dim"]),
        **window_fields(hf.get("sliding_window"), None, sizes["num_layers"], "sliding_window"),
        qkv_bias=bias,
        attention_out_bias=bias,
        norm="layer",
        head_bias=js.value(hf, "lm_head_bias", False),
        intermediate_size=width,
        moe=MoEConfig(
            intermediate_size=width,
            num_experts=js.needed(hf, "num_local_experts", "num_experts"),
            top_k=2,
            activation=js.activation(hf),
            routing="sparsemixer",
            norm_topk_prob=False,
            sparsemixer_eps=js.number(hf, "router_jitter_noise", 0.01),
            jitter_eps=js.number(hf, "input_jitter_noise", 0.0),
            aux_loss_coef=js.loss_per_layer(js.number(hf, "router_aux_loss_coef", 0.001), 2, sizes["num_layers"]),
            z_loss_coef=0.0,
        ),
    )


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    rope, found = config.rope, fit.misfits(config, ALLOWED) + fit.same_biases(config)
    for name in ("short_mscale", "long_mscale") if rope.scaling == "longrope" else ():
        found += fit.unless(getattr(rope, name) > 0, f"model.rope.{name}", getattr(rope, name), "greater than 0")
    return found


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "phimoe")
    moe = config.moe
    return (
        js.base(config, "phimoe", "PhimoeForCausalLM")
        | js.head_dim_if_unusual(config)
        | {
            "hidden_act": js.HIDDEN_ACT[moe.activation],
            "intermediate_size": moe.intermediate_size,
            "attention_bias": config.qkv_bias,
            "lm_head_bias": config.head_bias,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": js.loss_over_layers(moe.aux_loss_coef, moe.top_k, config.num_layers),
            "router_jitter_noise": moe.sparsemixer_eps,
            "input_jitter_noise": moe.jitter_eps,
            "rope_parameters": rope_parameters(config),
            "sliding_window": window(config),
        }
    )


def mapping(config: ModelConfig, fused: bool = False) -> list[Stored]:
    """The stored tensors; `fused`: as transformers 5 has them in memory."""

    def layer_mlp(_: int, stored: str, ours: str) -> list[Stored]:
        ours = f"{ours}.mlp"
        if fused:
            stored = f"{stored}.mlp"
            experts = tensors.experts_in(config, f"{stored}.experts", f"{ours}.experts", fused=True)
            return [tensors.router(config, f"{stored}.router.weight", ours), *experts]
        stored = f"{stored}.block_sparse_moe"
        experts = tensors.experts_one_by_one(config, f"{stored}.experts", f"{ours}.experts", "w1", "w3", "w2")
        return [tensors.router(config, f"{stored}.gate.weight", ours), *experts]

    return tensors.model(config, layer_mlp)
