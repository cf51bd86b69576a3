"""Rotary embeddings: `rope_parameters`, or the older `rope_theta` and `rope_scaling`, and our `RopeConfig`."""

from __future__ import annotations

from typing import Any

from dmoe.checkpoint.formats.families.config_json import Json, number, value
from dmoe.config import ModelConfig
from dmoe.config.attention import RopeConfig
from dmoe.errors import ConfigError

# Keys of each kind of scaling. "finetuned" says how a model came about.
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_LENGTHS = {"factor", "original_max_position_embeddings"}
_YARN = {"attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"}
_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {*_LENGTHS, "low_freq_factor", "high_freq_factor"},
    "yarn": _LENGTHS | _YARN,
    "longrope": {*_LENGTHS, "attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"},
}


def rope_fields(hf: Json, *, head_dim: int, theta: float = 10000.0, interleaved: bool = False) -> Json:
    """`rope_theta` and `rope` of `ModelConfig`.

    Args:
        theta: the family's base where the file has none.
        head_dim: dimensions that are rotated.

    Raises:
        ConfigError: a kind of scaling, or a key of one, that we do not have.
    """
    given = value(hf, "rope_scaling", None) or value(hf, "rope_parameters", {})
    if not isinstance(given, dict):
        raise ConfigError(f"config.json: rope_parameters is {given!r}: must be an object")
    rope = {key: v for key, v in given.items() if v is not None}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _KEYS:
        raise ConfigError(f"config.json: rope_type is {kind!r}: must be one of {', '.join(_KEYS)}")
    for key in sorted(set(rope) - _KEYS[kind] - _ALWAYS):
        wanted = f"absent with rope_type {kind!r}"
        raise ConfigError(f"config.json: {key} of rope_parameters is {rope[key]!r}: must be {wanted}")
    fraction = number(rope, "partial_rotary_factor", number(hf, "partial_rotary_factor", 1.0))
    if fraction != 1.0:
        raise ConfigError(f"config.json: partial_rotary_factor is {fraction}: must be 1.0")
    base = number(rope, "rope_theta", number(hf, "rope_theta", theta))
    scaling = {"default": "none"}.get(kind, kind)
    fields = _scaling_fields(hf, rope, kind, head_dim)
    return {"rope_theta": base, "rope": RopeConfig(scaling=scaling, interleaved=interleaved, **fields)}


def _scaling_fields(hf: Json, rope: Json, kind: str, head_dim: int) -> Json:
    if kind == "default":
        return {}
    if kind == "linear":
        return {"factor": _needed(rope, kind, "factor")}
    # A key beside the dictionary wins, as in transformers.
    original = value(hf, "original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    longest = value(hf, "max_position_embeddings", 0)
    original = longest if original is None else original
    fields: Json = {"original_max_seq_len": 0 if original == longest else original}
    if kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor")
        return fields | {name: _needed(rope, kind, name) for name in names}
    fields["factor"] = number(rope, "factor", longest / original)
    fields["attention_factor"] = number(rope, "attention_factor", 0.0)
    return fields | (_yarn_fields(rope) if kind == "yarn" else _longrope_fields(rope, head_dim))


def _yarn_fields(rope: Json) -> Json:
    return {
        "beta_fast": number(rope, "beta_fast", 32.0) or 32.0,
        "beta_slow": number(rope, "beta_slow", 1.0) or 1.0,
        "truncate": rope.get("truncate", True),
        "mscale": number(rope, "mscale", 0.0),
        "mscale_all_dim": number(rope, "mscale_all_dim", 0.0),
    }


def _longrope_fields(rope: Json, head_dim: int) -> Json:
    fields: Json = {}
    for name in ("short_factor", "long_factor"):
        factors = rope.get(name)
        if not isinstance(factors, list) or len(factors) != head_dim // 2:
            raise ConfigError(f"config.json: {name} is {factors!r}: must be a list of {head_dim // 2} numbers")
        fields[f"{name}s"] = tuple(float(x) for x in factors)
    for name in ("short_mscale", "long_mscale"):
        fields[name] = number(rope, name, 0.0)
    return fields


def _needed(rope: Json, kind: str, name: str) -> float:
    if name not in rope:
        raise ConfigError(f"config.json: {name} of rope_parameters is missing: must be there with rope_type {kind!r}")
    return number(rope, name, 0.0)


def rope_parameters(config: ModelConfig) -> Json:
    """Hugging Face's dictionary, as transformers 5 has it."""
    rope = config.rope
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if rope.scaling == "none":
        return parameters
    parameters |= {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "linear":
        return parameters
    parameters["original_max_position_embeddings"] = rope.original_max_seq_len or config.max_seq_len
    if rope.scaling == "llama3":
        return parameters | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.attention_factor:
        parameters["attention_factor"] = rope.attention_factor
    if rope.scaling == "yarn":
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        return parameters | {n: getattr(rope, n) for n in ("mscale", "mscale_all_dim") if getattr(rope, n)}
    parameters |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
    return parameters | {n: getattr(rope, n) for n in ("short_mscale", "long_mscale") if getattr(rope, n)}
