"""Parameters that are not trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn

from dmoe.config import ModelConfig, require
from dmoe.lora.names import matches, nearest_names
from dmoe.models import Decoder
from dmoe.moe import moe_layers

_TIED = ("embed_tokens.weight", "lm_head.weight")


def check_freeze(config: ModelConfig, patterns: tuple[str, ...]) -> None:
    """Raise ConfigError if a pattern of `train.freeze` means no parameter of the model, or all together mean all."""
    if not patterns:
        return
    with torch.device("meta"):
        names = dict(_named_parameters(Decoder(config)))
    for pattern in patterns:
        if not any(_is_frozen(name, (pattern,), config) for name in names):
            near = nearest_names(pattern, names)
            require(False, "train.freeze", pattern, f"a part of a parameter's name, such as {near}")
    trains = any(not _is_frozen(name, patterns, config) for name in names)
    require(trains, "train.freeze", patterns, "patterns that leave a parameter to train")


def freeze(part: Decoder, patterns: tuple[str, ...]) -> None:
    """Freeze the parameters of a model, or of a part of one, that the patterns mean. In place; nothing else changes."""
    for name, parameter in _named_parameters(part):
        if _is_frozen(name, patterns, part.config):
            parameter.requires_grad_(False)


def hold_choice_biases(part: Decoder) -> None:
    """Let the bias with which experts are chosen (`moe.expert_bias_rate`) stand still where the router is frozen."""
    for layer in moe_layers(part).values():
        if not layer.router.weight.requires_grad:
            layer.config = replace(layer.config, expert_bias_rate=0.0)


def _named_parameters(part: Decoder) -> Iterator[tuple[str, nn.Parameter]]:
    return part.named_parameters(remove_duplicate=False)  # a tied head under its own name too


def _is_frozen(name: str, patterns: tuple[str, ...], config: ModelConfig) -> bool:
    # Tied weights may be apart, in the first and the last stage of a pipeline: what freezes one freezes the other.
    names = _TIED if config.tie_embeddings and name in _TIED else (name,)
    return any(matches(n, pattern) for n in names for pattern in patterns)
