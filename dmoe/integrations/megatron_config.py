"""Megatron-core's `TransformerConfig` as our `MoEConfig`: one table of what is taken over and what is refused.

Every field that changes the numbers of a mixture-of-experts layer is in one of these tables, so that none is dropped
in silence: a new field of Megatron's needs a line here (a test compares with the installed version).
"""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F

from dmoe.config import Activation, MoEConfig, require
from dmoe.ops.activations import CLAMP_LIMIT

SAME: dict[str, tuple[str, Any]] = {
    # field of TransformerConfig: (field of MoEConfig, what Megatron's None stands for)
    "hidden_size": ("hidden_size", 0),
    "moe_ffn_hidden_size": ("intermediate_size", 0),
    "num_moe_experts": ("num_experts", 0),
    "moe_router_topk": ("top_k", 0),
    "gated_linear_unit": ("gated", False),
    "add_bias_linear": ("bias", False),
    "moe_router_score_function": ("score_function", "softmax"),
    "moe_router_topk_scaling_factor": ("routed_scaling_factor", 1.0),
    "moe_router_dtype": ("router_dtype", "fp32"),
    "moe_router_num_groups": ("n_group", 1),
    "moe_router_group_topk": ("topk_group", 1),
    "moe_input_jitter_eps": ("jitter_eps", 0.0),
    "moe_z_loss_coeff": ("z_loss_coef", 0.0),
    "moe_expert_capacity_factor": ("capacity_factor", 0.0),
    "moe_token_drop_policy": ("drop_policy", "probs"),
    "moe_pad_expert_input_to_capacity": ("pad_to_capacity", False),
    "moe_shared_expert_intermediate_size": ("shared_intermediate_size", 0),
    "moe_shared_expert_gate": ("shared_expert_gate", False),
    "moe_latent_size": ("latent_size", 0),
}

COMPUTED = (
    # read by the functions below
    "activation_func", "activation_func_clamp_value", "glu_linear_offset", "moe_router_pre_softmax",
    "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_router_enable_expert_bias",
    "moe_router_bias_update_rate",
)  # fmt: skip

LOSSES = {
    "aux_loss": "aux_loss_coef",
    "seq_aux_loss": "seq_aux_loss_coef",
    "global_aux_loss": "global_aux_loss_coef",
}
"""Types of moe_router_load_balancing_type: the coefficient each becomes. "none" is also taken."""

REFUSED: dict[str, tuple[Any, str]] = {
    # field: (the value that is right, and what to do instead)
    "moe_router_force_load_balancing": (False, "False"),
    "moe_enable_routing_replay": (False, "False"),
    "moe_apply_probs_on_input": (False, "False: the routing weight is applied to the activation"),
    "moe_router_padding_for_quantization": (False, "False"),
    "moe_extended_tp": (False, "False"),
    "activation_func_fp8_input_store": (False, "False"),
    "fp8": (None, 'None; get_dmoe_module_spec(precision="fp8") rounds the experts\' products'),
    "fp4": (None, "None"),
    "use_kitchen": (False, "False"),
    "quant_recipe": (None, "None"),
    "init_model_with_meta_device": (False, "False"),
    "overlap_moe_expert_parallel_comm": (False, "False"),
    "delay_wgrad_compute": (False, "False"),
    "cuda_graph_impl": ("none", "'none': with expert parallelism the sizes of messages are read from the device"),
}

WITHOUT_EFFECT = (
    # how Megatron computes its own layer; logging; what other parts of the model read
    "moe_layer_freq", "moe_token_dropping", "moe_grouped_gemm", "moe_use_legacy_grouped_gemm", "moe_permute_fusion",
    "moe_router_fusion", "moe_shared_expert_overlap", "moe_token_dispatcher_type", "moe_enable_deepep",
    "moe_flex_dispatcher_backend", "moe_deepep_num_sms", "moe_hybridep_num_sms", "moe_per_layer_logging",
    # older names, which TransformerConfig itself turns into the newer ones
    "moe_router_topk_limited_devices", "moe_router_padding_for_fp8", "moe_layer_recompute",
)  # fmt: skip

RECOMPUTED = ("moe_act", "shared_experts")
"""Parts of the layer that it does not recompute by themselves; "moe", all of it, it does."""


def moe_config(config: Any) -> MoEConfig:
    """The `MoEConfig` of a mixture-of-experts layer of `config`, a `TransformerConfig`.

    Raises:
        ConfigError: a field asks for what our layer does not do; names it and its value.
    """
    _check(config)
    fields: dict[str, Any] = {}
    for field, (name, for_none) in SAME.items():
        value = getattr(config, field, None)
        fields[name] = for_none if value is None else value
    fields |= _losses(config) | _weights(config)
    fields["activation"] = _activation(config)
    fields["router_bias"] = fields["bias"]
    fields["expert_bias_rate"] = config.moe_router_bias_update_rate if config.moe_router_enable_expert_bias else 0.0
    return MoEConfig(**fields)


def _check(config: Any) -> None:
    for field, (right, wanted) in REFUSED.items():
        value = getattr(config, field, right)
        _require(value == right, field, value, wanted)
    _require(config.num_moe_experts is not None, "num_moe_experts", None, "the number of experts")
    for field in ("moe_shared_expert_intermediate_size", "moe_latent_size"):
        value = getattr(config, field, None)
        _require(not (value and config.add_bias_linear), "add_bias_linear", True, f"False with {field} ({value})")
    recomputed = set(config.recompute_modules or ()) if config.recompute_granularity == "selective" else set()
    _require(not recomputed & set(RECOMPUTED), "recompute_modules", sorted(recomputed), f"without {RECOMPUTED}")
    offloaded = set(getattr(config, "offload_modules", None) or ())
    _require(not offloaded & {"expert_fc1", "moe_act"}, "offload_modules", sorted(offloaded), "without the experts'")


def _require(ok: bool, field: str, value: Any, wanted: str) -> None:
    require(ok, f"TransformerConfig.{field}", value, wanted)


def _losses(config: Any) -> dict[str, float]:
    types, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if not isinstance(types, list):
        types, coefficients = [types], [coefficients]
    losses = dict.fromkeys(LOSSES.values(), 0.0)
    for kind, coefficient in zip(types, coefficients):
        known = ("none", *LOSSES)
        _require(kind in known, "moe_router_load_balancing_type", kind, f"one of {', '.join(known)}")
        if kind != "none":
            losses[LOSSES[kind]] = coefficient
    return losses


def _weights(config: Any) -> dict[str, bool]:
    """Softmax over the chosen logits is the softmax over all, divided by the sum of the chosen. With groups the two
    differ, as groups are then chosen by sums of logits. Sigmoids are divided by their sum where there is more than one.
    """
    if config.moe_router_score_function != "softmax":
        return {"norm_topk_prob": config.moe_router_topk > 1, "softmax_after_topk": False}
    after = not config.moe_router_pre_softmax
    return {"norm_topk_prob": after, "softmax_after_topk": after and bool(config.moe_router_group_topk)}


def _activation(config: Any) -> Activation:
    from megatron.core.activations import fast_gelu, quick_gelu, squared_relu
    from megatron.core.fusions.fused_bias_geglu import quick_gelu as fused_quick_gelu

    func, clamp = config.activation_func, getattr(config, "activation_func_clamp_value", None)
    offset = getattr(config, "glu_linear_offset", 0.0)
    if func in (quick_gelu, fused_quick_gelu):
        wanted = f"{CLAMP_LIMIT} with quick_gelu, or another activation_func"
        _require(clamp == CLAMP_LIMIT, "activation_func_clamp_value", clamp, wanted)
        _require(offset == 1.0, "glu_linear_offset", offset, "1.0 with quick_gelu, or another activation_func")
        _require(
            config.gated_linear_unit, "gated_linear_unit", False, "True with quick_gelu, or another activation_func"
        )
        return "clamped_swiglu"
    _require(clamp is None, "activation_func_clamp_value", clamp, "None, or 7.0 with quick_gelu")
    _require(offset == 0.0, "glu_linear_offset", offset, "0.0, or 1.0 with quick_gelu")
    if isinstance(func, functools.partial) and func.func is F.gelu and func.keywords == {"approximate": "tanh"}:
        return "gelu_tanh"
    names: dict[Any, Activation] = {
        F.silu: "silu",
        F.gelu: "gelu",
        fast_gelu: "gelu_tanh",
        F.relu: "relu",
        squared_relu: "relu2",
    }
    _require(func in names, "activation_func", func, "silu, gelu, fast_gelu, relu, squared_relu or quick_gelu")
    return names[func]
