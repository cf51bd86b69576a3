"""What DeepSeek-V2 and V3 have in common: latent attention, leading dense layers, ungated shared experts."""

from __future__ import annotations

from dmoe.checkpoint.formats.families import config_json as js
from dmoe.checkpoint.formats.families import fit, tensors
from dmoe.checkpoint.formats.families.layers import moe_fields
from dmoe.checkpoint.formats.families.rope import rope_fields, rope_parameters
from dmoe.checkpoint.formats.mapping import Stored
from dmoe.config import ModelConfig, MoEConfig
from dmoe.config.attention import LatentAttentionConfig
from dmoe.errors import ConfigError


def model_fields(hf: js.Json, *, interleaved: bool, q_lora_rank: int, **moe: object) -> js.Json:
    """Arguments of `ModelConfig`.

    Args:
        q_lora_rank: where the file has no such key.
        moe: arguments of `MoEConfig` that the two have differently.
    """
    # The layers' pattern is not read by transformers either.
    js.check_neutral(hf, moe_layer_freq=(None, 1), mlp_bias=(None, False))
    latent = LatentAttentionConfig(
        kv_lora_rank=js.value(hf, "kv_lora_rank", 512),
        q_lora_rank=hf.get("q_lora_rank", q_lora_rank) or 0,
        qk_nope_head_dim=js.value(hf, "qk_nope_head_dim", 128),
        qk_rope_head_dim=js.value(hf, "qk_rope_head_dim", 64),
        v_head_dim=js.value(hf, "v_head_dim", 128),
    )
    # head_dim is that of a grouped-query model; here it is what is rotated.
    sizes = js.sizes({**hf, "head_dim": latent.qk_nope_head_dim + latent.qk_rope_head_dim})
    js.refuse_others(hf, "num_key_value_heads", (None, sizes["num_heads"]))
    num_layers, bias = sizes["num_layers"], js.value(hf, "attention_bias", False)
    mixtures = list(range(js.value(hf, "first_k_dense_replace", 0), num_layers))
    js.activation(hf, only="silu" if len(mixtures) < num_layers else None)
    width = js.needed(hf, "moe_intermediate_size")
    shared = js.value(hf, "n_shared_experts", 1)
    if shared < 1:
        raise ConfigError(f"config.json: n_shared_experts is {shared!r}: must be 1 or more")
    balance = "seq_aux_loss_coef" if js.value(hf, "seq_aux", True) else "aux_loss_coef"
    arguments = {
        "intermediate_size": width,
        "num_experts": js.needed(hf, "n_routed_experts", "num_experts", "num_local_experts"),
        "top_k": js.needed(hf, "num_experts_per_tok"),
        "activation": js.activation(hf),
        "routed_scaling_factor": js.number(hf, "routed_scaling_factor", 1.0),
        "shared_intermediate_size": shared * width,
        "aux_loss_coef": 0.0,
        # Added in each layer, and 1 at equal load, as ours.
        balance: js.number(hf, "aux_loss_alpha", 0.0),
        "z_loss_coef": 0.0,
    }
    return {
        **sizes,
        **rope_fields(hf, head_dim=latent.qk_rope_head_dim, interleaved=interleaved),
        **moe_fields(mixtures, num_layers),
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "latent": latent,
        "intermediate_size": js.value(hf, "intermediate_size", width),
        "moe": MoEConfig(**(arguments | moe)),
    }


ALLOWED = {
    "qkv_bias": fit.BOTH,
    "attention_out_bias": fit.BOTH,
    "latent.kv_lora_rank": fit.ANY,
    "rope.scaling": fit.SCALINGS,
    "moe_layer_freq": fit.ANY,
    "moe.activation": fit.ACTIVATIONS,
    "moe.routed_scaling_factor": fit.ANY,
    "moe.n_group": fit.ANY,
    "moe.shared_intermediate_size": fit.ANY,
}


def rules(config: ModelConfig, group_score_top: int) -> list[fit.Misfit]:
    """Rules about several fields that both have."""
    moe, mixtures = config.moe, config.moe_layers()
    found = fit.same_biases(config) + fit.silu_if_dense(config)
    found += fit.unless(bool(config.latent.kv_lora_rank), "model.latent.kv_lora_rank", 0, "greater than 0")
    heads = config.num_heads
    found += fit.unless(config.num_kv_heads == heads, "model.num_kv_heads", config.num_kv_heads, f"{heads} (num_heads)")
    if not mixtures:
        return found
    after_dense = mixtures == list(range(mixtures[0], config.num_layers))
    pattern = config.moe_layer_pattern or config.moe_layer_freq
    name = "model.moe_layer_pattern" if config.moe_layer_pattern else "model.moe_layer_freq"
    found += fit.unless(after_dense, name, pattern, "such that dense layers come first")
    shared, width = moe.shared_intermediate_size, moe.intermediate_size
    whole = shared > 0 and shared % width == 0
    found += fit.unless(whole, "model.moe.shared_intermediate_size", shared, f"a multiple of {width}, and not 0")
    if moe.n_group > 1:
        top = moe.group_score_top or max(1, moe.top_k // moe.topk_group)
        found += fit.unless(top == group_score_top, "model.moe.group_score_top", top, f"{group_score_top}")
    return found


def keys(config: ModelConfig, model_type: str, architecture: str) -> js.Json:
    """The inverse of `model_fields`."""
    moe, latent, mixtures = config.moe, config.latent, config.moe_layers()
    return js.base(config, model_type, architecture) | {
        "hidden_act": js.HIDDEN_ACT[moe.activation] if mixtures else "silu",
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": moe.intermediate_size,
        "attention_bias": config.qkv_bias,
        "kv_lora_rank": latent.kv_lora_rank,
        "q_lora_rank": latent.q_lora_rank or None,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": max(1, moe.shared_intermediate_size // moe.intermediate_size),
        "num_experts_per_tok": moe.top_k,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "first_k_dense_replace": mixtures[0] if mixtures else config.num_layers,
        "moe_layer_freq": 1,
        "aux_loss_alpha": moe.seq_aux_loss_coef or moe.aux_loss_coef,
        "seq_aux": bool(moe.seq_aux_loss_coef) or not moe.aux_loss_coef,
        "output_router_logits": False,
        "rope_parameters": rope_parameters(config),
    }


def mapping(config: ModelConfig, fused: bool = False) -> list[Stored]:
    """The stored tensors of both; `fused`: as transformers 5 has them in memory."""
    moe, D, mixtures = config.moe, config.hidden_size, set(config.moe_layers())

    def layer_mlp(i: int, stored: str, ours: str) -> list[Stored]:
        stored, ours = f"{stored}.mlp", f"{ours}.mlp"
        if i not in mixtures:
            return tensors.feed_forward(stored, ours, D, config.intermediate_size)
        found = [tensors.router(config, f"{stored}.gate.weight", ours)]
        if moe.score_function == "sigmoid":
            found.append(tensors.correction_bias(config, f"{stored}.gate", f"{ours}.router"))
        found += tensors.experts_in(config, f"{stored}.experts", f"{ours}.experts", fused)
        names = f"{stored}.shared_experts", f"{ours}.shared_experts"
        return found + tensors.feed_forward(*names, D, moe.shared_intermediate_size)

    return tensors.model(config, layer_mlp)
