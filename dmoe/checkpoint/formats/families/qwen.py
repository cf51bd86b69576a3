"""What Qwen2-MoE and Qwen3-MoE have in common: dense layers among the mixtures, weights that need not sum to 1."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import tensors
from dmoe.checkpoint.formats.families.layers import as_list, dense_layers, moe_fields
from dmoe.checkpoint.formats.mapping import Stored
from dmoe.config import ModelConfig, MoEConfig


def moe_layers(hf: js.Json, num_layers: int) -> list[int]:
    """Layers that are mixtures: every decoder_sparse_step-th, but those of mlp_only_layers."""
    step, dense = (
        js.value(hf, "decoder_sparse_step", 1),
        as_list(js.value(hf, "mlp_only_layers", []), "mlp_only_layers"),
    )
    return [i for i in range(num_layers) if i not in dense and (i + 1) % step == 0]


def network_fields(hf: js.Json, num_layers: int, **moe: object) -> js.Json:
    """Arguments of `ModelConfig` for the networks; `moe`: further ones of `MoEConfig`."""
    mixtures, top_k = moe_layers(hf, num_layers), js.needed(hf, "num_experts_per_tok")
    width, dense = js.needed(hf, "moe_intermediate_size"), len(mixtures) < num_layers
    coefficient = js.number(hf, "router_aux_loss_coef", 0.001)
    arguments = {
        "intermediate_size": width,
        "num_experts": js.needed(hf, "num_experts", "num_local_experts"),
        "top_k": top_k,
        "activation": js.activation(hf, only="silu" if dense else None),
        "norm_topk_prob": js.value(hf, "norm_topk_prob", False),
        "aux_loss_coef": js.loss_per_layer(coefficient, top_k, len(mixtures)),
        "z_loss_coef": 0.0,
    }
    return {
        "intermediate_size": js.value(hf, "intermediate_size", width),
        **moe_fields(mixtures, num_layers),
        "moe": MoEConfig(**(arguments | moe)),
    }


def network_keys(config: ModelConfig) -> js.Json:
    """The inverse of `network_fields`."""
    moe, num_mixtures = config.moe, len(config.moe_layers())
    return {
        "hidden_act": js.HIDDEN_ACT[moe.activation] if num_mixtures else "silu",
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": moe.intermediate_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.norm_topk_prob or moe.softmax_after_topk,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers(config),
        "output_router_logits": False,
        "router_aux_loss_coef": js.loss_over_layers(moe.aux_loss_coef, moe.top_k, num_mixtures),
    }


def mapping(config: ModelConfig, fused: bool = False) -> list[Stored]:
    """The stored tensors of both; `fused`: as transformers 5 has them in memory."""
    moe, D, mixtures = config.moe, config.hidden_size, set(config.moe_layers())

    def layer_mlp(i: int, stored: str, ours: str) -> list[Stored]:
        stored, ours = f"{stored}.mlp", f"{ours}.mlp"
        if i not in mixtures:
            return tensors.feed_forward(stored, ours, D, config.intermediate_size)
        experts = tensors.experts_in(config, f"{stored}.experts", f"{ours}.experts", fused)
        found = [tensors.router(config, f"{stored}.gate.weight", ours), *experts]
        if moe.shared_intermediate_size:
            names = f"{stored}.shared_expert", f"{ours}.shared_experts"
            found += tensors.feed_forward(*names, D, moe.shared_intermediate_size)
        if moe.shared_expert_gate:
            found += tensors.linear(f"{stored}.shared_expert_gate", f"{ours}.shared_expert_gate", 1, D)
        return found

    return tensors.model(config, layer_mlp)
