"""OLMoE's own training checkpoints: OLMo's configuration and names around dMoE layers.

Sources: the published configuration and code of OLMoE (arXiv:2409.02060). Queries, keys and values are one projection,
in this order; rotary embeddings have our layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dmoe.checkpoint.formats.mapping import Part, Stored, same
from dmoe.checkpoint.formats.megablocks_layers import check_expressible, layer_mapping
from dmoe.checkpoint.formats.megatron.names import rows
from dmoe.config import ModelConfig, MoEConfig, require
from dmoe.errors import ConfigError

_NEEDED: dict[str, Any] = {
    # option of OLMo's model: the value that our Decoder computes
    "rope": True,
    "alibi": False,
    "layer_norm_type": "rms",
    "activation_type": "swiglu",
    "block_type": "moe",
    "include_bias": False,
    "moe_dropless": True,
}
_OFF = ("bias_for_layer_norm", "norm_after", "scale_logits", "moe_interleave", "moe_shared_expert", "moe_expert_choice")


def is_olmo(options: Any) -> bool:
    """Whether the content of a config.yaml is that of an OLMoE training run."""
    model = options.get("model") if isinstance(options, dict) else None
    return isinstance(model, dict) and {"d_model", "moe_num_experts"} <= model.keys()


def to_config(options: Mapping[str, Any]) -> ModelConfig:
    """The `ModelConfig` of OLMo's `model` section. Raises ConfigError for what our Decoder does not compute."""

    def value(name: str, default: Any = None) -> Any:
        found = options.get(name)
        if found is None and default is None:
            raise ConfigError(f"OLMo's model.{name} is missing: must be there, it has no default here")
        return default if found is None else found

    for name, right in _NEEDED.items():
        require(value(name, right) == right, f"OLMo's model.{name}", options.get(name), repr(right))
    for name in _OFF:
        require(not options.get(name), f"OLMo's model.{name}", options.get(name), "off")
    D, heads = value("d_model"), value("n_heads")
    width = options.get("mlp_hidden_size") or int(value("mlp_ratio", 4) * D)
    kv_heads = options.get("n_kv_heads") or (1 if options.get("multi_query_attention") else heads)
    with_norm = bool(options.get("attention_layer_norm"))
    affine = value("attention_layer_norm_with_affine", True)
    require(affine or not with_norm, "OLMo's model.attention_layer_norm_with_affine", affine, "True")
    affine = value("layer_norm_with_affine", True)
    require(affine, "OLMo's model.layer_norm_with_affine", affine, "True")
    return ModelConfig(
        vocab_size=options.get("embedding_size") or value("vocab_size"),
        hidden_size=D,
        num_layers=value("n_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=D // heads,
        qk_norm="full" if with_norm else "none",
        clip_qkv=float(value("clip_qkv", 0.0)),
        rope_theta=float(value("rope_theta", 10000.0)),
        norm_eps=float(value("layer_norm_eps", 1e-5)),
        tie_embeddings=value("weight_tying", True),
        intermediate_size=width // 2,
        max_seq_len=value("max_sequence_length", 1024),
        init_std=value("init_std", 0.02),
        moe=MoEConfig(
            intermediate_size=width // 2,  # of a gated pair
            num_experts=value("moe_num_experts"),
            top_k=value("moe_top_k"),
            norm_topk_prob=False,
            aux_loss_coef=value("moe_loss_weight", 0.1) / value("n_layers"),  # of the mean over layers
            z_loss_coef=(options.get("moe_zloss_weight") or 0.0) / (value("n_layers") * value("moe_top_k")),
        ),
    )


def from_config(config: ModelConfig) -> dict[str, Any]:
    """OLMo's `model` section. Raises ConfigError, naming the field, for a model that it cannot express."""
    check_expressible(config, "dMoE")
    heads, moe = config.num_heads, config.moe
    needed: dict[str, tuple[Any, Any]] = {
        # field: (its value, what OLMo has)
        "qk_norm": (config.qk_norm if config.qk_norm != "none" else "full", "full"),
        "head_dim": (config.head_dim * heads, config.hidden_size),
        "norm": (config.norm, "rms"),
        "qkv_bias": (config.qkv_bias or config.attention_out_bias, False),
        "attention_sinks": (config.attention_sinks, False),
        "attention_scale": (config.attention_scale, 0.0),
        "attention_window": (config.attention_window, 0),
        "layer_attention": (set(config.layer_attention) <= {"full"}, True),
        "layer_rope": (all(config.layer_rope), True),
        "rope.scaling": (config.rope.scaling, "none"),
        "rope.interleaved": (config.rope.interleaved, False),
        "rope.fraction": (config.rope.fraction, 1.0),
        "latent.kv_lora_rank": (config.latent.kv_lora_rank, 0),
        "head_bias": (config.head_bias, False),
        "embedding_multiplier": (config.embedding_multiplier, 1.0),
        "residual_multiplier": (config.residual_multiplier, 1.0),
        "logits_divisor": (config.logits_divisor, 1.0),
        "moe_layers()": (len(config.moe_layers()), config.num_layers),
        "moe.gated": (moe.gated, True),
        "moe.activation": (moe.activation, "silu"),
        "moe.norm_topk_prob": (moe.norm_topk_prob or moe.softmax_after_topk, False),
        "moe.shared_intermediate_size": (moe.shared_intermediate_size, 0),
        "moe.capacity_factor": (moe.capacity_factor, 0.0),
    }
    for name, (found, right) in needed.items():
        require(found == right, f"model.{name}", found, f"{right!r} in OLMo's checkpoints")
    return _NEEDED | {
        "d_model": config.hidden_size,
        "n_heads": heads,
        "n_kv_heads": config.num_kv_heads,
        "n_layers": config.num_layers,
        "mlp_hidden_size": 2 * moe.intermediate_size,
        "clip_qkv": config.clip_qkv or None,
        "rope_theta": config.rope_theta,
        "attention_layer_norm": config.qk_norm == "full",
        "attention_layer_norm_with_affine": True,
        "layer_norm_with_affine": True,
        "layer_norm_eps": config.norm_eps,
        "bias_for_layer_norm": False,
        "weight_tying": config.tie_embeddings,
        "max_sequence_length": config.max_seq_len,
        "vocab_size": config.vocab_size,
        "embedding_size": config.vocab_size,
        "init_std": config.init_std,
        "moe_num_experts": moe.num_experts,
        "moe_top_k": moe.top_k,
        "moe_loss_weight": moe.aux_loss_coef * config.num_layers,
        "moe_zloss_weight": moe.z_loss_coef * config.num_layers * moe.top_k or None,
    }


def mapping(config: ModelConfig) -> list[Stored]:
    """The tensors of a model."""
    D, V, H = config.hidden_size, config.vocab_size, config.head_dim
    q, kv = config.num_heads * H, config.num_kv_heads * H
    tensors = [same("transformer.wte.weight", "embed_tokens.weight", V, D)]
    for i in range(config.num_layers):
        theirs, ours = f"transformer.blocks.{i}.", f"layers.{i}."
        attention = f"{ours}self_attn."
        parts, start = [], 0
        for name, width in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            parts.append(Part(f"{attention}{name}.weight", place=rows(start, start + width)))
            start += width
        tensors += [
            same(f"{theirs}attn_norm.weight", f"{ours}input_layernorm.weight", D),
            Stored(f"{theirs}att_proj.weight", (start, D), tuple(parts)),
            same(f"{theirs}attn_out.weight", f"{attention}o_proj.weight", D, q),
            same(f"{theirs}ff_norm.weight", f"{ours}post_attention_layernorm.weight", D),
            *layer_mapping(f"{theirs}ffn.", f"{ours}mlp.", D, config.moe, "dMoE"),
        ]
        if config.qk_norm == "full":
            tensors.append(same(f"{theirs}q_norm.weight", f"{attention}q_norm.weight", q))
            tensors.append(same(f"{theirs}k_norm.weight", f"{attention}k_norm.weight", kv))
    tensors.append(same("transformer.ln_f.weight", "norm.weight", D))
    if not config.tie_embeddings:
        tensors.append(same("transformer.ff_out.weight", "lm_head.weight", V, D))
    return tensors
