"""Our tensors: their names and shapes for a configuration, and which have a row an expert."""

from __future__ import annotations

import re
from functools import lru_cache

import torch

from dmoe.config import ModelConfig

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
_EXPERTS = re.compile(r"\.experts\.\w+$")


@lru_cache(maxsize=4)
def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters and buffers of `Decoder(config)` by name, a tied head left out. Do not change it."""
    from dmoe.models import Decoder

    tensors = Decoder.on_meta(config).state_dict()
    return {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if not (name == HEAD and config.tie_embeddings)
    }


def num_params(config: ModelConfig) -> int:
    """Parameters of `Decoder(config)`, a tied head counted once."""
    from dmoe.models import Decoder

    return Decoder.on_meta(config).num_params()


def has_expert_rows(name: str) -> bool:
    """Whether dim 0 of a parameter of ours counts experts, so that it is read and written by rows."""
    return _EXPERTS.search(name) is not None


def keeps_dtype(name: str) -> bool:
    """Whether a tensor of ours has one dtype whatever that of the model: the bias of the choice of experts."""
    return name.endswith(".e_score_correction_bias")


def cast_dtype(name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor of ours, stored as `stored`, is written with `dtype` asked for (None: as it is)."""
    return stored if dtype is None or not stored.is_floating_point or keeps_dtype(name) else dtype
