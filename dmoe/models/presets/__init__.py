"""Named model configurations. Each family has a file; this is the list."""

from __future__ import annotations

import difflib

from dmoe.config import ModelConfig
from dmoe.errors import ConfigError
from dmoe.models.presets.deepseek import DEEPSEEK_V2, DEEPSEEK_V2_LITE, DEEPSEEK_V3
from dmoe.models.presets.gpt_oss import GPT_OSS_20B, GPT_OSS_120B
from dmoe.models.presets.granitemoe import GRANITE_3_0_1B_A400M
from dmoe.models.presets.llama import (
    LLAMA_2_7B,
    LLAMA_2_13B,
    LLAMA_2_70B,
    LLAMA_3_1_8B,
    LLAMA_3_1_70B,
    LLAMA_3_1_405B,
    LLAMA_3_2_1B,
    LLAMA_3_2_3B,
    LLAMA_3_8B,
    LLAMA_3_70B,
)
from dmoe.models.presets.llama4 import LLAMA_4_MAVERICK
from dmoe.models.presets.mistral import MISTRAL_7B
from dmoe.models.presets.mixtral import MIXTRAL_8X7B, MIXTRAL_8X22B
from dmoe.models.presets.olmoe import OLMOE_1B_7B
from dmoe.models.presets.qwen2_moe import QWEN1_5_MOE_A2_7B, QWEN2_57B_A14B
from dmoe.models.presets.qwen3_moe import QWEN3_30B_A3B, QWEN3_235B_A22B
from dmoe.models.presets.tiny import TINY_DENSE, TINY_MOE

PRESETS: dict[str, ModelConfig] = {
    "tiny-moe": TINY_MOE,
    "tiny-dense": TINY_DENSE,
    "olmoe-1b-7b": OLMOE_1B_7B,
    "mixtral-8x7b": MIXTRAL_8X7B,
    "mixtral-8x22b": MIXTRAL_8X22B,
    "qwen1.5-moe-a2.7b": QWEN1_5_MOE_A2_7B,
    "qwen2-57b-a14b": QWEN2_57B_A14B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "qwen3-235b-a22b": QWEN3_235B_A22B,
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-v2": DEEPSEEK_V2,
    "deepseek-v3": DEEPSEEK_V3,
    "gpt-oss-20b": GPT_OSS_20B,
    "gpt-oss-120b": GPT_OSS_120B,
    "granite-3.0-1b-a400m": GRANITE_3_0_1B_A400M,
    "llama-4-maverick": LLAMA_4_MAVERICK,
    "mistral-7b": MISTRAL_7B,
    "llama-2-7b": LLAMA_2_7B,
    "llama-2-13b": LLAMA_2_13B,
    "llama-2-70b": LLAMA_2_70B,
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": LLAMA_3_70B,
    "llama-3.1-8b": LLAMA_3_1_8B,
    "llama-3.1-70b": LLAMA_3_1_70B,
    "llama-3.1-405b": LLAMA_3_1_405B,
    "llama-3.2-1b": LLAMA_3_2_1B,
    "llama-3.2-3b": LLAMA_3_2_3B,
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
