"""What the tests of upcycling share: small dense models with weights that no symmetry hides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.upcycle import ModelSource
from dmoe.config import ModelConfig
from dmoe.models import Decoder


def dense_config(**changes: Any) -> ModelConfig:
    fields = {
        "vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "intermediate_size": 24,
        "moe_layer_freq": 0, "tie_embeddings": False,
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


def dense_model(dtype: torch.dtype = torch.float64, **changes: Any) -> Decoder:
    """Random weights, also in norms and biases, of a size at which every network matters."""
    model = Decoder(dense_config(**changes)).to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def token_ids(num_sequences: int = 2, length: int = 9, vocab_size: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(vocab_size, (num_sequences, length), generator=generator)


class CountingSource(ModelSource):
    """Notes what is read."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        self.reads: list[str] = []

    def read(self, name: str, index: int | None = None) -> Tensor:
        self.reads.append(name)
        return super().read(name, index)

    def names(self) -> Iterable[str]:
        return list(super().names())
