"""Reading and writing the fields of a config.json that all families share."""

from __future__ import annotations

from typing import Any

from dmoe.config import ModelConfig
from dmoe.errors import ConfigError

Json = dict[str, Any]

# hidden_act by our name of the activation.
HIDDEN_ACT = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
_ACTIVATION = {theirs: ours for ours, theirs in HIDDEN_ACT.items()} | {"swish": "silu", "gelu_new": "gelu_tanh"}

# What changes the maths in some model and is not translated: the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "attention_dropout": (None, 0),
    "attention_probs_dropout_prob": (None, 0),
    "hidden_dropout": (None, 0),
    "hidden_dropout_prob": (None, 0),
    "resid_pdrop": (None, 0),
    "embd_pdrop": (None, 0),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "position_embedding_type": (None, "rope", "rotary"),
    "use_bidirectional_attention": (None, False),
    "prefix_lm": (None, False),
}


def refuse_others(hf: Json, key: str, allowed: tuple[Any, ...]) -> None:
    """Raise unless `key` is missing or has one of the `allowed` values."""
    if key not in hf or hf[key] in allowed:
        return
    wanted = " or ".join(repr(value) for value in allowed if value is not None) or "absent"
    raise ConfigError(f"config.json: {key} is {_short(hf[key])}: must be {wanted}, which is all that is supported here")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_neutral(hf: Json, **neutral: tuple[Any, ...]) -> None:
    """Raise if a key that changes the maths and is not translated has a value that changes it.

    Args:
        neutral: values that a family allows for keys of its own, in place of or besides the ones common to all.

    Raises:
        ConfigError: names key, value and what is supported.
    """
    for key, allowed in (_NEUTRAL | neutral).items():
        refuse_others(hf, key, allowed)


def refuse_layer_types(hf: Json) -> None:
    """Raise for a list of layers' kinds of attention in a family whose layers are alike, unless all are plain."""
    refuse_others(hf, "layer_types", (None, ["full_attention"] * value(hf, "num_hidden_layers", 0)))


def needed(hf: Json, key: str, *aliases: str) -> Any:
    """The value of `key` or, where it is missing, of an alias.

    Raises:
        ConfigError: there is none.
    """
    for name in (key, *aliases):
        if hf.get(name) is not None:
            return hf[name]
    raise ConfigError(f"config.json: {key} is missing: must be there for a model of type {hf.get('model_type')!r}")


def value(hf: Json, key: str, default: Any) -> Any:
    """The value of `key`; `default` where it is missing or null."""
    found = hf.get(key)
    return default if found is None else found


def number(hf: Json, key: str, default: float) -> float:
    """The same, as a float: a whole number in JSON is one too."""
    found = value(hf, key, default)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise ConfigError(f"config.json: {key} is {found!r}: must be a number")
    return float(found)


def activation(hf: Json, *, only: str | None = None) -> Any:
    """Our name of `hidden_act`; with `only`, no other is supported (our dense layers have SiLU)."""
    name = value(hf, "hidden_act", "silu")
    ours = _ACTIVATION.get(name)
    if ours is None or (only is not None and ours != only):
        wanted = f"{HIDDEN_ACT[only]!r}" if only else f"one of {', '.join(_ACTIVATION)}"
        raise ConfigError(f"config.json: hidden_act is {name!r}: must be {wanted}")
    return ours


def sizes(hf: Json, *, eps: float = 1e-6, kv_heads: int | None = None, head_dim: int | None = None) -> Json:
    """Arguments of `ModelConfig` that every family has: sizes, norm and tying.

    Args:
        eps, kv_heads, head_dim: what transformers takes where the file has no such key; None: as many heads of keys as
            of queries, and heads that add up to the width.
    """
    heads, width = needed(hf, "num_attention_heads"), needed(hf, "hidden_size")
    head_dim = hf.get("head_dim", head_dim)
    kv_heads = hf.get("num_key_value_heads", kv_heads)
    if head_dim is None:
        if not isinstance(heads, int) or not isinstance(width, int) or heads < 1 or width % heads:
            wanted = f"a divisor of hidden_size ({width!r}) where head_dim is not given"
            raise ConfigError(f"config.json: num_attention_heads is {heads!r}: must be {wanted}")
        head_dim = width // heads
    return {
        "vocab_size": needed(hf, "vocab_size"),
        "hidden_size": width,
        "num_layers": needed(hf, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "qk_norm": "none",
        "norm_eps": number(hf, "rms_norm_eps", eps),
        "tie_embeddings": value(hf, "tie_word_embeddings", False),
        "max_seq_len": needed(hf, "max_position_embeddings"),
        "init_std": number(hf, "initializer_range", 0.02),
    }


def base(config: ModelConfig, model_type: str, architecture: str) -> Json:
    """Keys of a config.json that every family has."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "use_cache": True,
        # A tokeniser's business: the defaults of transformers may lie outside of the vocabulary.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def head_dim_if_unusual(config: ModelConfig) -> Json:
    """`head_dim` for families that have the key only where it is not hidden_size / num_attention_heads."""
    usual = config.num_heads * config.head_dim == config.hidden_size
    return {} if usual else {"head_dim": config.head_dim}


def loss_per_layer(coefficient: float, top_k: int, num_moe_layers: int) -> float:
    """Our weight of the balancing loss from theirs, which weighs one loss over all layers that is K times ours; ours is
    added in each layer."""
    return coefficient * top_k / max(1, num_moe_layers)


def loss_over_layers(coefficient: float, top_k: int, num_moe_layers: int) -> float:
    """The inverse of `loss_per_layer`, to 12 digits, so that what was multiplied and divided is again what it was."""
    return float(f"{coefficient * max(1, num_moe_layers) / top_k:.12g}")
