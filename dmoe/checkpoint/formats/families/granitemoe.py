"""Granite 3 MoE (IBM): factors on embeddings, residual stream, attention and logits; fused experts on disk.

GraniteMoeShared is the same with a shared expert, whose gate and up projections are one tensor.
"""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, tensors
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.checkpoint.formats.mapping import Part, Stored, same
from dmoe.config import ModelConfig, MoEConfig

MODEL_TYPES = ("granitemoe", "granitemoeshared")
ALLOWED = {
    "qkv_bias": fit.BOTH,
    "attention_out_bias": fit.BOTH,
    "attention_scale": fit.ANY,
    "rope.scaling": fit.SCALINGS,
    "embedding_multiplier": fit.ANY,
    "residual_multiplier": fit.ANY,
    "logits_divisor": fit.ANY,
    "moe.activation": fit.ACTIVATIONS,
    "moe.shared_intermediate_size": fit.ANY,
}


def to_config(hf: js.Json) -> ModelConfig:
    """Our config from a config.json. ConfigError: a value that changes the maths in a way that we do not have."""
    js.check_neutral(hf, sliding_window=(None,))
    js.refuse_layer_types(hf)
    sizes, top_k = js.sizes(hf), js.value(hf, "num_experts_per_tok", 2)
    bias, width = js.value(hf, "attention_bias", False), js.needed(hf, "intermediate_size")
    shared = js.value(hf, "shared_intermediate_size", 0) if hf.get("model_type") == "granitemoeshared" else 0
    return ModelConfig(
        **sizes,
        **rope_fields(hf, head_dim=sizes["head_dim"]),
        qkv_bias=bias,
        attention_out_bias=bias,
        attention_scale=js.number(hf, "attention_multiplier", 1.0),
        embedding_multiplier=js.number(hf, "embedding_multiplier", 1.0),
        residual_multiplier=js.number(hf, "residual_multiplier", 1.0),
        logits_divisor=js.number(hf, "logits_scaling", 1.0),
        intermediate_size=width,
        moe=MoEConfig(
            intermediate_size=width,
            num_experts=js.needed(hf, "num_local_experts", "num_experts"),
            top_k=top_k,
            activation=js.activation(hf),
            softmax_after_topk=True,
            shared_intermediate_size=shared,
            aux_loss_coef=js.loss_per_layer(js.number(hf, "router_aux_loss_coef", 0.001), top_k, sizes["num_layers"]),
            z_loss_coef=0.0,
        ),
    )


def misfits(config: ModelConfig) -> list[fit.Misfit]:
    """What of the model this family cannot express."""
    return fit.misfits(config, ALLOWED) + fit.same_biases(config)


def from_config(config: ModelConfig) -> js.Json:
    """A config.json. ConfigError: the family cannot express the model."""
    fit.refuse(misfits(config), "granitemoe")
    moe = config.moe
    kind, architecture, shared = "granitemoe", "GraniteMoeForCausalLM", {}
    if moe.shared_intermediate_size:
        kind, architecture = "granitemoeshared", "GraniteMoeSharedForCausalLM"
        shared = {"shared_intermediate_size": moe.shared_intermediate_size}
    return (
        js.base(config, kind, architecture)
        | js.head_dim_if_unusual(config)
        | shared
        | {
            "hidden_act": js.HIDDEN_ACT[moe.activation],
            "intermediate_size": moe.intermediate_size,
            "attention_bias": config.qkv_bias,
            "attention_multiplier": config.attention_scale or config.head_dim**-0.5,
            "embedding_multiplier": config.embedding_multiplier,
            "residual_multiplier": config.residual_multiplier,
            "logits_scaling": config.logits_divisor,
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "output_router_logits": False,
            "router_aux_loss_coef": js.loss_over_layers(moe.aux_loss_coef, moe.top_k, config.num_layers),
            "rope_parameters": rope_parameters(config),
        }
    )


def mapping(config: ModelConfig, fused: bool = False) -> list[Stored]:
    """The stored tensors; `fused`: under the names of transformers 5 (the shapes are the same)."""
    D, S = config.hidden_size, config.moe.shared_intermediate_size
    names = ("router", "experts.gate_up_proj", "experts.down_proj")
    router, gate_up, down = names if fused else ("router.layer", "input_linear.weight", "output_linear.weight")

    def layer_mlp(_: int, stored: str, ours: str) -> list[Stored]:
        moe, ours = f"{stored}.block_sparse_moe", f"{ours}.mlp"
        experts = tensors.experts_fused(config, f"{moe}.{gate_up}", f"{moe}.{down}", f"{ours}.experts")
        found = [tensors.router(config, f"{moe}.{router}.weight", ours), *experts]
        return found + (shared(f"{stored}.shared_mlp", f"{ours}.shared_experts") if S else [])

    def shared(stored: str, ours: str) -> list[Stored]:
        gate = Part(f"{ours}.gate_proj.weight", place=tensors.first_rows(S))
        up = Part(f"{ours}.up_proj.weight", place=tensors.rows_from(S))
        return [
            Stored(f"{stored}.input_linear.weight", (2 * S, D), (gate, up)),
            same(f"{stored}.output_linear.weight", f"{ours}.down_proj.weight", D, S),
        ]

    return tensors.model(config, layer_mlp)
