"""Mixtral (Jiang et al., arXiv:2401.04088): experts' matrices w1 (gate), w3 (up) and w2 (down)."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, tensors
from dmoe.checkpoint.formats.families.layers import window, window_fields
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.checkpoint.formats.mapping import Stored
from dmoe.config import ModelConfig, MoEConfig

MODEL_TYPES = ("mixtral",)
ALLOWED = {
    "layer_attention": (("full",), ("sliding",)),
    "rope.scaling": fit.SCALINGS,
    "moe.activation": fit.ACTIVATIONS,
}


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    # Their jitter is on what experts read, too.
    js.check_neutral(hf, router_jitter_noise=(None, 0))
    js.refuse_layer_types(hf)
    sizes, top_k = js.sizes(hf, eps=1e-5, kv_heads=8), js.needed(hf, "num_experts_per_tok")
    return ModelConfig(
        **sizes,
        **rope_fields(hf, theta=1e6, head_dim=sizes["head_dim"]),
        **window_fields(hf.get("sliding_window"), None, sizes["num_layers"], "sliding_window"),
        intermediate_size=js.needed(hf, "intermediate_size"),
        moe=MoEConfig(
            intermediate_size=js.needed(hf, "intermediate_size"),
            num_experts=js.needed(hf, "num_local_experts", "num_experts"),
            top_k=top_k,
            activation=js.activation(hf),
            aux_loss_coef=js.loss_per_layer(js.number(hf, "router_aux_loss_coef", 0.001), top_k, sizes["num_layers"]),
            z_loss_coef=0.0,
        ),
    )


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    return fit.misfits(config, ALLOWED)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "mixtral")
    moe, num_layers = config.moe, config.num_layers
    return js.base(config, "mixtral", "MixtralForCausalLM") | {
        "head_dim": config.head_dim,
        "hidden_act": js.HIDDEN_ACT[moe.activation],
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": js.loss_over_layers(moe.aux_loss_coef, moe.top_k, num_layers),
        "router_jitter_noise": 0.0,
        "rope_parameters": rope_parameters(config),
        "sliding_window": window(config),
    }


def mapping(config: ModelConfig, fused: bool = False) -> list[Stored]:
    """The stored tensors; `fused`: as transformers 5 has them in memory."""

    def layer_mlp(_: int, stored: str, ours: str) -> list[Stored]:
        stored, ours = f"{stored}.{'mlp' if fused else 'block_sparse_moe'}", f"{ours}.mlp"
        router = tensors.router(config, f"{stored}.gate.weight", ours)
        return [router, *experts(f"{stored}.experts", f"{ours}.experts")]

    def experts(stored: str, ours: str) -> list[Stored]:
        if fused:
            return tensors.experts_fused(config, f"{stored}.gate_up_proj", f"{stored}.down_proj", ours)
        return tensors.experts_one_by_one(config, stored, ours, gate="w1", up="w3", down="w2")

    return tensors.model(config, layer_mlp)
