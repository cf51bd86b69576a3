"""Which layers are mixtures of experts and what their attention sees: Hugging Face's lists and our fields."""

from __future__ import annotations

from typing import Any

from dmoe.checkpoint.formats.families.config_json import Json
from dmoe.config import ModelConfig
from dmoe.errors import ConfigError

_KIND = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}
_LAYER_TYPE = {ours: theirs for theirs, ours in _KIND.items()}


def moe_fields(moe_layers: list[int], num_layers: int) -> Json:
    """Arguments of `ModelConfig` that say that `moe_layers` are mixtures of experts: the shortest that do."""
    if not moe_layers:
        return {"moe_layer_freq": 0}
    for freq in range(1, num_layers + 1):
        first = moe_layers[0] if freq == 1 else max(0, moe_layers[0] - freq + 1)
        if moe_layers == [i for i in range(first, num_layers) if i % freq == 0]:
            return {"moe_layer_freq": freq, "first_k_dense": first}
    return {"moe_layer_pattern": tuple(int(i in moe_layers) for i in range(num_layers))}


def dense_layers(config: ModelConfig) -> list[int]:
    """Layers that are no mixture of experts."""
    mixtures = set(config.moe_layers())
    return [i for i in range(config.num_layers) if i not in mixtures]


def attention_kinds(config: ModelConfig) -> list[str]:
    """Of each layer: "full", "sliding" or "chunked"."""
    return [config.attention_kind(i) for i in range(config.num_layers)]


def window_fields(window: int | None, layer_types: list[str] | None, num_layers: int, key: str) -> Json:
    """Arguments of `ModelConfig` for a window (or chunk, by name of its `key`) and the kind of each layer.

    Args:
        layer_types: None: all layers have the window, if there is one.
    """
    if layer_types is None:
        return {"attention_window": window} if window else {}
    if len(layer_types) != num_layers or not set(layer_types) <= set(_KIND):
        wanted = f"{num_layers} names out of {', '.join(_KIND)}"
        raise ConfigError(f"config.json: layer_types is {layer_types!r}: must be {wanted}")
    kinds = tuple(_KIND[name] for name in layer_types)
    if set(kinds) == {"full"}:
        return {}
    if not window:
        raise ConfigError(f"config.json: {key} is {window!r}: must be greater than 0 with layer_types {layer_types!r}")
    same_kind: Json = {"attention_window": window}
    return same_kind if set(kinds) == {"sliding"} else same_kind | {"layer_attention": kinds}


def window(config: ModelConfig) -> int | None:
    """The window or chunk, if a layer has one."""
    return config.attention_window if set(attention_kinds(config)) != {"full"} else None


def layer_types(config: ModelConfig) -> list[str]:
    """Hugging Face's list of each layer's kind of attention."""
    return [_LAYER_TYPE[kind] for kind in attention_kinds(config)]


def rope_layers(config: ModelConfig) -> list[int]:
    """A 1 for each layer with a rotary embedding."""
    return [int(config.has_rope(i)) for i in range(config.num_layers)]


def as_list(value: Any, key: str) -> list[Any]:
    """`value`, if it is a list."""
    if not isinstance(value, list):
        raise ConfigError(f"config.json: {key} is {value!r}: must be a list")
    return value
