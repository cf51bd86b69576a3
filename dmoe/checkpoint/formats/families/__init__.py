"""Families of Hugging Face models: one file each, which says how its config.json and its tensors are ours.

Each has `MODEL_TYPES`, `to_config(hf)`, `from_config(config)`, `misfits(config)` and `mapping(config, fused)`. Some
have `IGNORED`, patterns of stored tensors that are not of the model, and `PREFIX`, by model_type, of those that are.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from dmoe.checkpoint.formats.families import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    granitemoe,
    llama,
    llama4,
    mistral,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
)
from dmoe.config import ModelConfig
from dmoe.errors import ConfigError

# Where several can express a model, the first does.
FAMILIES: tuple[ModuleType, ...] = (
    llama,
    mistral,
    mixtral,
    olmoe,
    qwen3_moe,
    qwen2_moe,
    granitemoe,
    gpt_oss,
    deepseek_v3,
    deepseek_v2,
    llama4,
    phimoe,
)


def name(family: ModuleType) -> str:
    """The name of a family: that of its file."""
    return family.__name__.rpartition(".")[2]


def family_of(hf: dict[str, Any]) -> ModuleType:
    """The family of a config.json, by its model_type.

    Raises:
        ConfigError: a type that we do not have; lists those we have.
    """
    model_type = hf.get("model_type")
    for family in FAMILIES:
        if model_type in family.MODEL_TYPES:
            return family
    known = ", ".join(kind for family in FAMILIES for kind in family.MODEL_TYPES)
    raise ConfigError(f"config.json: model_type is {model_type!r}: must be one of {known}")


def family_for(config: ModelConfig) -> ModuleType:
    """The family that can express a model of ours.

    Raises:
        ConfigError: none can; names the field that is in the way of the nearest.
    """
    found = {family: family.misfits(config) for family in FAMILIES}
    for family, misfits in found.items():
        if not misfits:
            return family
    nearest = min(found, key=lambda family: len(found[family]))
    field, value, wanted = found[nearest][0]
    raise ConfigError(
        f"{field} is {value!r}: must be {wanted}, or no Hugging Face family can express the model "
        f"(nearest: {name(nearest)})"
    )
