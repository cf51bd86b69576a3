"""Model and optimiser as a state dict keyed by parameter name, which survives another layout of ranks or groups.

Keys are the parameter's plain name: torch.compile's `_orig_mod` is left out, so a run may turn it on or off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from dmoe.errors import ConfigError


def training_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """{"model": name -> tensor, "optimizer": {"state": name -> its state, "param_groups": [...]}}.

    The tensors are those in use, not copies: save them, or let a checkpoint be loaded into them and then call
    `restore_training_state`. A trainable parameter without optimiser state (before the first step) gets the state it
    would start with; neither parameters, gradients nor later steps change. For that the optimiser takes one step at
    learning rate 0 on zero gradients, so its step hooks run. Tied parameters have one state, under their first name;
    frozen ones have none.
    """
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

    _init_optimizer_state(optimizer)
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def restore_training_state(model: nn.Module, optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Put `loaded`, of the form of `training_state`, into model and optimiser, bit for bit.

    Works on the state that a checkpoint was loaded into and on any other copy of it. Raises ConfigError if the
    parameter groups hold other parameters than the saved ones, or names or shapes differ.
    """
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    current = training_state(model, optimizer)["optimizer"]
    saved = loaded["optimizer"]
    _compare_groups(current["param_groups"], saved["param_groups"])
    if current["state"].keys() != saved["state"].keys():
        names = sorted(current["state"].keys() ^ saved["state"].keys())
        raise ConfigError(f"optimizer state of {names[0]} is in only one of checkpoint and run: must be in both")
    for name, values in saved["state"].items():
        if values.keys() != current["state"][name].keys():
            raise ConfigError(
                f"optimizer state of {name} is {sorted(current['state'][name])}: must be {sorted(values)}"
            )
    try:
        # A copy of the dict: torch renames the keys of compiled modules in the one it is given.
        set_model_state_dict(model, dict(loaded["model"]))
    except RuntimeError as error:
        raise ConfigError(f"the checkpoint is of another model: {' '.join(str(error).split())}") from error
    # In place rather than by Optimizer.load_state_dict, which casts the state to the parameter's dtype.
    with torch.no_grad():
        for name, values in saved["state"].items():
            parameter_state = current["state"][name]
            for key, value in values.items():
                if isinstance(value, torch.Tensor):
                    parameter_state[key].copy_(value)
                else:
                    parameter_state[key] = value
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"]):
        for key, value in saved_group.items():
            if key == "params":
                continue
            if isinstance(group.get(key), torch.Tensor):
                group[key].copy_(value)  # a learning rate that a captured or compiled step reads
            else:
                group[key] = value.clone() if isinstance(value, torch.Tensor) else value


def _compare_groups(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    if len(current) != len(saved):
        raise ConfigError(
            f"optimizer.param_groups has length {len(current)}: must be {len(saved)} as in the checkpoint"
        )
    for index, (group, saved_group) in enumerate(zip(current, saved)):
        different = sorted(set(group["params"]) ^ set(saved_group["params"]))
        if different:
            raise ConfigError(f"optimizer.param_groups.{index} differs from the checkpoint's in {different[0]}")


def _init_optimizer_state(optimizer: Optimizer) -> None:
    """Give every trainable parameter that has no state the one its first step would start from."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in parameters if p.requires_grad and not optimizer.state.get(p)]
    if not new:
        return
    # get_optimizer_state_dict does as much, but not when gradients are present or others have state already, and it
    # leaves the step counts at 1: a run that asked for its state before training would then train differently.
    gradients = [p.grad for p in parameters]
    rates = [group["lr"] for group in optimizer.param_groups if "lr" in group]
    try:
        for p in parameters:
            p.grad = None
        for p in new:
            p.grad = torch.zeros_like(p)
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], torch.Tensor) else 0.0
        optimizer.step()
    finally:
        for p, gradient in zip(parameters, gradients):
            p.grad = gradient
        for group in optimizer.param_groups:
            if "lr" in group:
                group["lr"] = rates.pop(0)
    for p in new:
        step = optimizer.state[p].get("step") if p in optimizer.state else None
        if isinstance(step, torch.Tensor):
            step.zero_()
        elif step is not None:
            optimizer.state[p]["step"] = 0
