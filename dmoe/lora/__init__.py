"""Fine-tuning: starting from given weights, frozen parameters, and low-rank adapters.

check_trainable(config)                      raises ConfigError before anything is built
load_base(parts, Path(train.init_from))      weights from a run or a Hugging Face folder
make_trainable(parts, train, mesh)           freezes, or freezes all and adds adapters
merge(model)                                 folds adapters into the weights
"""

from __future__ import annotations

from collections.abc import Sequence

from dmoe.config import ModelConfig, TrainConfig
from dmoe.lora.adapters import adapted_modules, add_adapters, check_lora
from dmoe.lora.base import load_base
from dmoe.lora.freeze import check_freeze, freeze, hold_choice_biases
from dmoe.lora.merge import merge
from dmoe.models import Decoder
from dmoe.parallel import ParallelMesh

__all__ = [
    "adapted_modules",
    "add_adapters",
    "check_trainable",
    "count_trainable",
    "freeze",
    "load_base",
    "make_trainable",
    "merge",
]


def check_trainable(model: ModelConfig, train: TrainConfig) -> None:
    """Raise ConfigError if `train.freeze` or `train.lora` names what the model does not have."""
    check_freeze(model, train.freeze)
    if train.lora.rank:
        check_lora(model, train.lora)


def make_trainable(parts: Sequence[Decoder], train: TrainConfig, mesh: ParallelMesh | None = None) -> None:
    """Freeze what `train.freeze` names; with `train.lora.rank` all, and add adapters. In place.

    Call it on parts that are laid out and have their weights, before an optimiser is built.
    """
    for part in parts:
        freeze(part, train.freeze)
        if train.lora.rank:
            add_adapters(part, train.lora, mesh, seed=train.seed)
        hold_choice_biases(part)


def count_trainable(model: ModelConfig, train: TrainConfig) -> int:
    """Parameters that a run trains, without allocating them."""
    decoder = Decoder.on_meta(model)
    make_trainable([decoder], train)
    return sum(p.numel() for p in decoder.parameters() if p.requires_grad)
