"""Megatron's command-line arguments, which its checkpoints carry, and our `ModelConfig`, each as the other.

Tables, so that what is taken over and what is refused can be read off. A model is expressible if it is a GPTModel with
SwiGLU, RMSNorm, rotary embeddings and grouped-query attention, dense or with mixtures of experts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dmoe.config import ModelConfig, MoEConfig, require
from dmoe.config.attention import RopeConfig

SAME = {
    # argument: (field of ModelConfig, Megatron's default)
    "num_layers": ("num_layers", None),
    "hidden_size": ("hidden_size", None),
    "ffn_hidden_size": ("intermediate_size", None),
    "num_attention_heads": ("num_heads", None),
    "max_position_embeddings": ("max_seq_len", None),
    "rotary_base": ("rope_theta", 10000),
    "norm_epsilon": ("norm_eps", 1e-5),
    "add_qkv_bias": ("qkv_bias", False),
    "init_method_std": ("init_std", 0.02),
}
MOE_SAME = {
    # argument: (field of MoEConfig, what Megatron's None or a missing argument stands for)
    "num_experts": ("num_experts", None),
    "moe_router_topk": ("top_k", 2),
    "moe_router_score_function": ("score_function", "softmax"),
    "moe_router_topk_scaling_factor": ("routed_scaling_factor", 1.0),
    "moe_router_num_groups": ("n_group", 1),
    "moe_router_group_topk": ("topk_group", 1),
    "moe_router_dtype": ("router_dtype", "fp32"),
    "moe_input_jitter_eps": ("jitter_eps", 0.0),
    "moe_z_loss_coeff": ("z_loss_coef", 0.0),
    "moe_expert_capacity_factor": ("capacity_factor", 0.0),
    "moe_token_drop_policy": ("drop_policy", "probs"),
    "moe_pad_expert_input_to_capacity": ("pad_to_capacity", False),
    "moe_shared_expert_intermediate_size": ("shared_intermediate_size", 0),
    "moe_shared_expert_gate": ("shared_expert_gate", False),
}
LOSSES = {
    "aux_loss": "aux_loss_coef",
    "seq_aux_loss": "seq_aux_loss_coef",
    "global_aux_loss": "global_aux_loss_coef",
}
NEEDED: dict[str, Any] = {
    # argument: the value that is right; also the default of one that is missing, but for the first three
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_latent_attention": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "no_rope_freq": None,
    "window_attn_skip_freq": None,
    "rope_type": "rope",
    "squared_relu": False,
    "quick_geglu": False,
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "moe_latent_size": None,
    "moe_apply_probs_on_input": False,
    "mtp_num_layers": None,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "linear_attention_freq": None,
    "experimental_attention_variant": None,
    "use_rotary_position_embeddings": True,
}
_NO_DEFAULT = ("swiglu", "normalization", "add_bias_linear", "position_embedding_type")

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # field of ModelConfig: values that a GPTModel of this kind has
    "qk_norm": ("none", "head"),
    "clip_qkv": (0.0,),
    "attention_out_bias": (False,),
    "attention_sinks": (False,),
    "attention_temperature_scale": (0.0,),
    "norm": ("rms",),
    "head_bias": (False,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_divisor": (1.0,),
    "mlp_bias": (False,),
}
_MOE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "activation": ("silu",),
    "gated": (True,),
    "bias": (False,),
    "routing": ("topk",),
    "router_bias": (False,),
    "weigh_input": (False,),
    "latent_size": (0,),
}
_LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
"""What Megatron's rope scaling has built in."""


def check_expressible(config: ModelConfig) -> None:
    """Raise ConfigError, naming the field, for a model that Megatron's GPTModel cannot compute."""
    where = "for Megatron"
    scale = config.attention_scale
    usual = scale == 0.0 or math.isclose(scale, config.head_dim**-0.5)
    _require(usual, "model.attention_scale", scale, f"0.0 (1 / sqrt(head_dim)) {where}")
    for name, right in _NEUTRAL.items():
        value = getattr(config, name)
        _require(value in right, f"model.{name}", value, f"{' or '.join(map(repr, right))} {where}")
    _require(not config.latent.kv_lora_rank, "model.latent.kv_lora_rank", config.latent.kv_lora_rank, f"0 {where}")
    kinds = set(config.layer_attention)
    _require(len(kinds) <= 1 and kinds <= {"full", "sliding"}, "model.layer_attention", config.layer_attention,
             f'the same of all layers, "full" or "sliding", {where}')  # fmt: skip
    _require(all(config.layer_rope), "model.layer_rope", config.layer_rope, f"1 for each layer {where}")
    _check_rope(config.rope, config)
    if config.moe_layers():
        _check_moe(config.moe)


def _check_rope(rope: RopeConfig, config: ModelConfig) -> None:
    kinds = ("none", "linear", "llama3")
    _require(rope.scaling in kinds, "model.rope.scaling", rope.scaling, f"one of {', '.join(kinds)} for Megatron")
    if rope.scaling == "llama3":
        for name, right in _LLAMA3.items():
            value = getattr(rope, name)
            value = value or config.max_seq_len if name == "original_max_seq_len" else value
            _require(value == right, f"model.rope.{name}", value, f"{right}, as Megatron has it built in")


def _check_moe(moe: MoEConfig) -> None:
    for name, right in _MOE_NEUTRAL.items():
        value = getattr(moe, name)
        _require(value in right, f"model.moe.{name}", value, f"{' or '.join(map(repr, right))} for Megatron")
    default = max(1, moe.top_k // moe.topk_group)
    _require(moe.n_group == 1 or moe.group_score_top in (0, default), "model.moe.group_score_top", moe.group_score_top,
             f"0 or {default} (top_k // topk_group) for Megatron")  # fmt: skip
    sums_to_1 = moe.norm_topk_prob or moe.softmax_after_topk
    if moe.score_function == "softmax":
        _require(moe.top_k > 1 or not sums_to_1, "model.moe.norm_topk_prob", True,
                 "False with model.moe.top_k 1 for Megatron, where the router would have no gradient")  # fmt: skip
        _require(moe.n_group == 1 or moe.softmax_after_topk or not moe.norm_topk_prob, "model.moe.norm_topk_prob", True,
                 "False with groups and a softmax over all experts for Megatron")  # fmt: skip
    else:
        wanted = f"{moe.top_k > 1} with scores by {moe.score_function} and top_k {moe.top_k} for Megatron"
        _require(moe.norm_topk_prob == (moe.top_k > 1), "model.moe.norm_topk_prob", moe.norm_topk_prob, wanted)


def to_args(config: ModelConfig) -> dict[str, Any]:
    """Megatron's arguments of the model, by name. Raises ConfigError for a model that it cannot compute."""
    check_expressible(config)
    args = dict(NEEDED)
    args |= {name: getattr(config, field) for name, (field, _) in SAME.items()}
    sliding = config.attention_window and "full" not in config.layer_attention
    args |= {
        "seq_length": config.max_seq_len,
        "kv_channels": config.head_dim,
        "group_query_attention": config.num_kv_heads != config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "qk_layernorm": config.qk_norm == "head",
        "untie_embeddings_and_output_weights": not config.tie_embeddings,
        "rotary_percent": config.rope.fraction,
        "rotary_interleaved": config.rope.interleaved,
        "rotary_seq_len_interpolation_factor": config.rope.factor if config.rope.scaling == "linear" else None,
        "use_rope_scaling": config.rope.scaling == "llama3",
        "rope_scaling_factor": config.rope.factor if config.rope.scaling == "llama3" else 8.0,
        # (to the left, to the right) beside the query itself
        "window_size": (config.attention_window - 1, 0) if sliding else None,
    }
    return args | (_moe_args(config) if config.moe_layers() else {"num_experts": None, "moe_layer_freq": 1})


def _moe_args(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    args: dict[str, Any] = {}
    for name, (field, for_none) in MOE_SAME.items():
        value = getattr(moe, field)
        none = value == for_none and name not in ("moe_router_topk", "moe_router_score_function")
        args[name] = None if none and not isinstance(value, (bool, str)) else value
    args["moe_router_dtype"] = moe.router_dtype
    layers = config.moe_layers()
    every = len(layers) == config.num_layers
    kinds = {kind: getattr(moe, field) for kind, field in LOSSES.items() if getattr(moe, field)}
    single = len(kinds) <= 1
    return args | {
        "moe_ffn_hidden_size": moe.intermediate_size,
        "moe_layer_freq": 1 if every else [int(i in layers) for i in range(config.num_layers)],
        "moe_router_pre_softmax": moe.score_function == "softmax"
        and not (moe.norm_topk_prob or moe.softmax_after_topk),
        "moe_router_enable_expert_bias": moe.expert_bias_rate > 0,
        "moe_router_bias_update_rate": moe.expert_bias_rate or 1e-3,
        "moe_router_load_balancing_type": next(iter(kinds), "none") if single else list(kinds),
        "moe_aux_loss_coeff": next(iter(kinds.values()), 0.0) if single else list(kinds.values()),
    }


def from_args(args: Mapping[str, Any], vocab_size: int | None = None) -> ModelConfig:
    """The `ModelConfig` of a checkpoint's arguments.

    Args:
        args: by name; those of an older Megatron may lack newer ones.
        vocab_size: without padding. None: the arguments' own, if they have one, else the padded size.

    Raises:
        ConfigError: an argument is missing or asks for what our `Decoder` does not compute; names it.
    """
    for name, right in NEEDED.items():
        if name == "use_rotary_position_embeddings" or (name not in args and name not in _NO_DEFAULT):
            continue
        if name == "position_embedding_type" and args.get("use_rotary_position_embeddings"):
            continue
        value = args.get(name)
        ok = value == right or (not right and not value)
        _require(ok, f"Megatron's {name}", value, repr(right))
    fields = {field: _get(args, name, default) for name, (field, default) in SAME.items()}
    for name in ("rope_theta", "norm_eps", "init_std"):
        fields[name] = float(fields[name])
    heads = fields["num_heads"]
    grouped = _get(args, "group_query_attention", False)
    window = _get(args, "window_size", False)
    if window:
        _require(tuple(window)[1] == 0 and window[0] >= 0, "Megatron's window_size", window, "(n, 0)")
    config = ModelConfig(
        **fields,
        vocab_size=_vocab_size(args, vocab_size),
        num_kv_heads=_get(args, "num_query_groups", heads) if grouped else heads,
        head_dim=_get(args, "kv_channels", fields["hidden_size"] // heads),
        qk_norm="head" if _get(args, "qk_layernorm", False) else "none",
        attention_window=window[0] + 1 if window else 0,
        rope=_rope(args),
        tie_embeddings=not _get(args, "untie_embeddings_and_output_weights", False),
        moe_layer_freq=0,
    )
    return config if args.get("num_experts") is None else _with_moe(config, args)


def _vocab_size(args: Mapping[str, Any], vocab_size: int | None) -> int:
    padded = args.get("padded_vocab_size")
    found: Any = vocab_size or args.get("vocab_size") or padded
    _require(found is not None, "Megatron's padded_vocab_size", None, "in the checkpoint's arguments")
    if padded is not None:
        _require(found <= padded, "vocab_size", found, f"at most the checkpoint's padded_vocab_size ({padded})")
    return int(found)


def _rope(args: Mapping[str, Any]) -> RopeConfig:
    rope = RopeConfig(
        interleaved=bool(_get(args, "rotary_interleaved", False)), fraction=float(_get(args, "rotary_percent", 1.0))
    )
    if _get(args, "use_rope_scaling", False):
        return replace(rope, scaling="llama3", factor=float(_get(args, "rope_scaling_factor", 8.0)), **_LLAMA3)
    linear = args.get("rotary_seq_len_interpolation_factor")
    return replace(rope, scaling="linear", factor=float(linear)) if linear not in (None, 1) else rope


def _with_moe(config: ModelConfig, args: Mapping[str, Any]) -> ModelConfig:
    fields = {field: _get(args, name, for_none) for name, (field, for_none) in MOE_SAME.items()}
    kinds, coefficients = (
        _get(args, "moe_router_load_balancing_type", "aux_loss"),
        _get(args, "moe_aux_loss_coeff", 0.0),
    )
    if not isinstance(kinds, (list, tuple)):
        kinds, coefficients = [kinds], [coefficients]
    fields |= dict.fromkeys(LOSSES.values(), 0.0)
    for kind, coefficient in zip(kinds, coefficients):
        known = ("none", *LOSSES)
        _require(kind in known, "Megatron's moe_router_load_balancing_type", kind, f"one of {', '.join(known)}")
        if kind != "none":
            fields[LOSSES[kind]] = float(coefficient)
    after = not _get(args, "moe_router_pre_softmax", False)
    if fields["score_function"] == "softmax":
        fields |= {"norm_topk_prob": after, "softmax_after_topk": after and fields["n_group"] > 1}
    else:
        fields["norm_topk_prob"] = fields["top_k"] > 1
    biased = _get(args, "moe_router_enable_expert_bias", False)
    moe = MoEConfig(
        **fields,
        intermediate_size=_get(args, "moe_ffn_hidden_size", config.intermediate_size),
        expert_bias_rate=float(_get(args, "moe_router_bias_update_rate", 1e-3)) if biased else 0.0,
    )
    freq = _get(args, "moe_layer_freq", 1)
    pattern = tuple(freq) if isinstance(freq, (list, tuple)) else ()
    return replace(config, moe=moe, moe_layer_freq=1 if pattern else freq, moe_layer_pattern=pattern)


def _get(args: Mapping[str, Any], name: str, default: Any) -> Any:
    value = args.get(name)
    if value is None:
        _require(default is not None, f"Megatron's {name}", None, "in the checkpoint's arguments")
        return default
    return value


def _require(ok: bool, name: str, value: Any, wanted: str) -> None:
    require(ok, name, value, wanted)


_NOT_RESTORED = {
    # argument that --use-checkpoint-args leaves alone: Megatron's default
    "norm_epsilon": 1e-5,
    "qk_layernorm": False,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "rotary_seq_len_interpolation_factor": None,
    "window_size": None,
    "moe_router_dtype": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_bias_update_rate": 1e-3,
    "moe_shared_expert_gate": False,
    "moe_z_loss_coeff": None,
    "moe_input_jitter_eps": None,
    "moe_expert_capacity_factor": None,
    "moe_token_drop_policy": "probs",
    "moe_pad_expert_input_to_capacity": False,
}


def launch_flags(config: ModelConfig) -> list[str]:
    """Flags of the model that Megatron's trainer needs beside `--use-checkpoint-args`, which restores the others."""
    args, result = to_args(config), []
    for name, default in _NOT_RESTORED.items():
        value = args.get(name, default)
        if value != default:
            flag = "--" + name.replace("_", "-")
            result += [flag] if value is True else [flag, str(value).replace(" ", "")]
    return result


def namespace(args: Mapping[str, Any]) -> argparse.Namespace:
    return argparse.Namespace(**args)
