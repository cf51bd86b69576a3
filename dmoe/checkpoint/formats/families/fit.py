"""Whether a family can express a model: every field of ours that changes what it computes, and its plain value.

Fields of training alone, such as losses and noise, have no say: no config.json has them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dmoe.checkpoint.formats.families.layers import attention_kinds, dense_layers, rope_layers
from dmoe.config import ModelConfig
from dmoe.errors import ConfigError

ANY = None
Allowed = Mapping[str, tuple[Any, ...] | None]
"""By field, the values that a family has besides the one without effect; `ANY` for all."""


class Misfit(NamedTuple):
    """A field of the model that a family cannot express."""

    field: str
    value: Any
    wanted: str


# Values of a Llama: what a family does not mention must be this.
_NEUTRAL: dict[str, Any] = {
    "qk_norm": "none",
    "clip_qkv": 0.0,
    "qkv_bias": False,
    "attention_out_bias": False,
    "attention_sinks": False,
    "attention_scale": 0.0,
    "layer_attention": ("full",),
    "layer_rope": (1,),
    "rope.scaling": "none",
    "rope.interleaved": False,
    "rope.fraction": 1.0,
    "latent.kv_lora_rank": 0,
    "norm": "rms",
    "head_bias": False,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_divisor": 1.0,
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "moe.activation": "silu",
    "moe.gated": True,
    "moe.bias": False,
    "moe.routing": "topk",
    "moe.score_function": "softmax",
    "moe.norm_topk_prob": True,
    "moe.routed_scaling_factor": 1.0,
    "moe.n_group": 1,
    "moe.weigh_input": False,
    "moe.router_bias": False,
    "moe.expert_bias_rate": 0.0,
    "moe.capacity_factor": 0.0,
    "moe.shared_intermediate_size": 0,
    "moe.shared_expert_gate": False,
    "moe.latent_size": 0,
}

_LAYERS = ("no layer is a mixture", "each layer is a mixture", "some layers are mixtures")

BOTH = (True, False)
SCALINGS = ("none", "linear", "yarn", "llama3", "longrope")
# With hidden_act, which also holds for dense layers, where we have SiLU.
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def effective(config: ModelConfig) -> dict[str, Any]:
    """The fields that change the maths, alike where the maths is."""
    moe, scale = config.moe, config.attention_scale
    fields = {name: getattr(config, name) for name in _NEUTRAL if "." not in name and name != "moe_layer_freq"}
    fields["attention_scale"] = 0.0 if math.isclose(scale, config.query_head_dim**-0.5, rel_tol=1e-12) else scale
    fields["layer_attention"] = tuple(sorted(set(attention_kinds(config))))
    fields["layer_rope"] = tuple(sorted(set(rope_layers(config))))
    fields["rope.scaling"], fields["rope.fraction"] = config.rope.scaling, config.rope.fraction
    fields["rope.interleaved"] = config.rope.interleaved
    fields["latent.kv_lora_rank"] = config.latent.kv_lora_rank
    dense = dense_layers(config)
    fields["mlp_bias"] = config.mlp_bias and bool(dense)
    # 0: dense; 1: a mixture in each layer; 2: both kinds of layers.
    fields["moe_layer_freq"] = 2 - int(not dense) if config.moe_layers() else 0
    if config.moe_layers():
        fields |= {name: getattr(moe, name.removeprefix("moe.")) for name in _NEUTRAL if name.startswith("moe.")}
        # A softmax over the chosen logits is the softmax over all, divided by the sum of the chosen.
        fields["moe.norm_topk_prob"] = moe.norm_topk_prob or moe.softmax_after_topk
        if moe.routing == "sparsemixer":  # has weights of its own
            fields["moe.norm_topk_prob"] = True
    return fields


def misfits(config: ModelConfig, allowed: Allowed) -> list[Misfit]:
    """The fields whose values are neither without effect nor among the `allowed`."""
    found = []
    for name, value in effective(config).items():
        values = (_NEUTRAL[name],) if name not in allowed else allowed[name]
        if values is ANY or value in values:
            continue
        found.append(_misfit(config, name, value, values))
    return found


def _misfit(config: ModelConfig, name: str, value: Any, values: tuple[Any, ...]) -> Misfit:
    """With the field as it was given and in words for what is not a value of it."""
    if name == "moe_layer_freq":
        pattern = config.moe_layer_pattern
        name, value = ("moe_layer_pattern", pattern) if pattern else (name, config.moe_layer_freq)
        return Misfit(f"model.{name}", value, "such that " + " or ".join(_LAYERS[v] for v in values))
    if name == "layer_attention" and not config.layer_attention:
        return Misfit("model.attention_window", config.attention_window, "0")
    if name in ("layer_attention", "layer_rope"):
        kinds = (" and ".join(repr(kind) for kind in kinds) for kinds in values)
        return Misfit(f"model.{name}", getattr(config, name), f"{' or '.join(kinds)} in its layers")
    return Misfit(f"model.{name}", value, " or ".join(repr(v) for v in values))


def unless(ok: bool, field: str, value: Any, wanted: str) -> list[Misfit]:
    """A misfit unless `ok`, for rules about several fields."""
    return [] if ok else [Misfit(field, value, wanted)]


def refuse(found: list[Misfit], family: str) -> None:
    """Raise about the first misfit, if there is one."""
    if found:
        field, value, wanted = found[0]
        raise ConfigError(f"{field} is {value!r}: must be {wanted} in a Hugging Face model of type {family!r}")


def same_biases(config: ModelConfig) -> list[Misfit]:
    """For families with one switch for the biases of all four projections."""
    qkv = config.qkv_bias
    return unless(config.attention_out_bias == qkv, "model.attention_out_bias", not qkv, f"{qkv}, as model.qkv_bias")


def silu_if_dense(config: ModelConfig) -> list[Misfit]:
    """For families whose hidden_act also holds for dense layers, where we have SiLU."""
    both = bool(config.moe_layers()) and len(config.moe_layers()) < config.num_layers
    return unless(not both or config.moe.activation == "silu", "model.moe.activation", config.moe.activation, "'silu'")
