"""A model in memory as a `Source`, for tests of what is written."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dmoe.config import ModelConfig
from dmoe.models import Decoder


class Weights:
    """Random weights of a model."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        model = Decoder(config)
        model.init_weights(seed=1)
        self.state = model.state_dict()
        if config.tie_embeddings:
            del self.state["lm_head.weight"]

    def names(self) -> Iterable[str]:
        return self.state

    def dtype(self, name: str) -> torch.dtype:
        return self.state[name].dtype

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        return self.state[name] if index is None else self.state[name][index]
