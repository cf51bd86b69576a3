"""Named model configurations. Each family has a file; this is the list."""

from __future__ import annotations

import difflib

from dmoe.config import ModelConfig
from dmoe.errors import ConfigError
from dmoe.models.presets.mixtral import MIXTRAL_8X7B
from dmoe.models.presets.olmoe import OLMOE_1B_7B
from dmoe.models.presets.qwen3_moe import QWEN3_30B_A3B
from dmoe.models.presets.tiny import TINY_DENSE, TINY_MOE

PRESETS: dict[str, ModelConfig] = {
    "tiny-moe": TINY_MOE,
    "tiny-dense": TINY_DENSE,
    "olmoe-1b-7b": OLMOE_1B_7B,
    "mixtral-8x7b": MIXTRAL_8X7B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
}


def get_preset(name: str) -> ModelConfig:
    """The preset called `name`.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ConfigError(f"preset is {name!r}: must be one of {', '.join(PRESETS)}{hint}")
