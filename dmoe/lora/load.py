"""A run with adapters as a model in one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dmoe.checkpoint import load_latest
from dmoe.checkpoint.parts import model_tensors
from dmoe.config import RunConfig
from dmoe.errors import ConfigError
from dmoe.lora.adapters import add_adapters
from dmoe.lora.base import load_base
from dmoe.lora.state import adapters_only, check_base, describe_base
from dmoe.models import Decoder


def load_adapted(run_dir: Path, config: RunConfig, device: torch.device | str = "cpu") -> tuple[Decoder, int]:
    """The model of a run with adapters (`config.train.lora.rank` > 0), from its newest whole checkpoint, and its step.

    The adapters are apart from the weights; `dmoe.lora.merge` folds them in. In evaluation mode.

    Raises:
        ConfigError: the base is not where it was, or is another one; or there is no checkpoint.
    """
    train = config.train
    model = Decoder.on_meta(config.model)
    model = model.to(torch.float64 if train.precision == "fp64" else torch.float32).to_empty(device=device)
    model.init_weights(train.seed)
    if train.init_from:
        load_base([model], Path(train.init_from))
    add_adapters(model, train.lora, seed=train.seed)
    tensors = {name: tensors[0] for name, tensors in model_tensors([model]).items()}
    base = describe_base(train)
    state: dict[str, Any] = adapters_only({"model": tensors}, base)
    loaded = load_latest(run_dir, state, on_refused=print)
    if loaded is None:
        raise ConfigError(f"run is {str(run_dir)!r}: must have a checkpoint")
    check_base(state["base"], base)
    return model.eval(), loaded[0]


def without_adapters(config: RunConfig, run_dir: Path) -> RunConfig:
    """The configuration of what merging makes of a run."""
    lora = replace(config.train.lora, rank=0)
    return replace(config, run_dir=str(run_dir), train=replace(config.train, lora=lora, init_from=""))
