"""What a checkpoint of a run with adapters holds: adapters, their optimiser state, and which base they belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dmoe.checkpoint import ranks
from dmoe.config import TrainConfig
from dmoe.errors import ConfigError
from dmoe.lora.adapters import is_adapter
from dmoe.lora.base import fingerprint

Tree = dict[str, Any]


def adapters_only(state: Tree, base: Tree) -> Tree:
    """The part of a training state that is saved: without the frozen weights, and with `base` (`describe_base`)."""
    model = {name: tensor for name, tensor in state["model"].items() if is_adapter(name)}
    return {**state, "model": model, "base": dict(base)}


def describe_base(train: TrainConfig) -> Tree:
    """What the frozen weights are: a folder, or a seed. Collective: rank 0 reads the folder."""
    path = train.init_from
    if not path:
        return {"init_from": "", "fingerprint": "", "seed": train.seed}
    return {"init_from": path, "fingerprint": ranks.on_main(lambda: fingerprint(Path(path))), "seed": -1}


def check_base(saved: Tree, base: Tree) -> None:
    """Raise ConfigError if adapters belong to other frozen weights than those that were loaded."""
    for name, field in (("fingerprint", "train.init_from"), ("seed", "train.seed")):
        if saved[name] != base[name]:
            value = base["init_from"] if name == "fingerprint" else base["seed"]
            wanted = saved["init_from"] or f"left out, and train.seed {saved['seed']}"
            raise ConfigError(
                f"{field} is {value!r}: must be the weights that the adapters of this run were trained on: {wanted}, "
                "and they must not have changed since"
            )
