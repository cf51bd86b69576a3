"""Model and optimiser as a state dict keyed by parameter name, which survives another layout of ranks or groups.

Keys are the parameter's plain name: torch.compile's `_orig_mod` is left out, so a run may turn it on or off. Written
without torch.distributed.checkpoint.state_dict, which cannot take several modules that share one optimiser.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from dmoe.checkpoint import ranks
from dmoe.checkpoint.parts import Parts, as_parts, model_tensors, parameter_names
from dmoe.checkpoint.stored_form import stored_form
from dmoe.errors import ConfigError


def training_state(model: Parts, optimizer: Optimizer) -> dict[str, Any]:
    """{"model": name -> tensor, "optimizer": {"state": name -> its state, "param_groups": [...]}}.

    `model` is one module or the parts of a pipeline that this rank holds, whose names are those of the whole model;
    collective over all ranks. "params" of a group names the parameters of all ranks.

    The tensors are those in use, not copies: save them, or let a checkpoint be loaded into them and then call
    `restore_training_state`. A trainable parameter without optimiser state (before the first step) gets the state it
    would start with; neither parameters, gradients nor later steps change. For that the optimiser takes one step at
    learning rate 0 on zero gradients, so its step hooks run. Tied parameters have one state, under their first name;
    frozen ones have none. Modules that FSDP2 has gathered are sharded again.

    Raises ConfigError if the optimiser has parameters that the model lacks, or ranks have different groups.
    """
    parts = as_parts(model)
    names = parameter_names(parts)
    _init_optimizer_state(optimizer)
    state = {name: states[0] for name, states in _optimizer_states(optimizer, names).items()}
    groups = _named_groups(optimizer, names)
    ranks.on_each(lambda: _require_values_on_main(state, names, groups))
    return {
        "model": {name: tensors[0] for name, tensors in model_tensors(parts).items()},
        # Copies of the dicts: what is loaded into them reaches the optimiser when it is restored.
        "optimizer": {
            "state": {name: dict(values) for name, values in state.items()},
            "param_groups": groups,
        },
    }


def restore_training_state(model: Parts, optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Put `loaded`, of the form of `training_state`, into model and optimiser, bit for bit. Collective.

    Works on the state that a checkpoint was loaded into and on any other copy of it. Raises ConfigError, on every
    rank, if the parameter groups hold other parameters than the saved ones, or names or shapes differ; nothing has
    changed then.
    """
    parts = as_parts(model)
    names = parameter_names(parts)
    _init_optimizer_state(optimizer)
    tensors, states = model_tensors(parts), _optimizer_states(optimizer, names)
    groups, saved = _named_groups(optimizer, names), loaded["optimizer"]

    def compare() -> None:
        _compare_groups(groups, saved["param_groups"])
        _compare_states(states, saved["state"])
        _compare_model(tensors, loaded["model"])

    ranks.on_each(compare)
    with torch.no_grad():
        for name, holders in tensors.items():
            for tensor in holders:
                _copy(name, tensor, loaded["model"][name])
        # In place rather than by Optimizer.load_state_dict, which casts the state to the parameter's dtype.
        for name, values in saved["state"].items():
            for state in states[name]:
                for key, value in values.items():
                    if isinstance(value, torch.Tensor):
                        _copy(f"{name}.{key}", state[key], value)
                    else:
                        state[key] = value
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"]):
        for key, value in saved_group.items():
            if key == "params":
                continue
            if isinstance(group.get(key), torch.Tensor):
                group[key].copy_(value)  # a learning rate that a captured or compiled step reads
            else:
                group[key] = value.clone() if isinstance(value, torch.Tensor) else value


def _optimizer_states(optimizer: Optimizer, names: dict[torch.Tensor, str]) -> dict[str, list[dict[str, Any]]]:
    """By parameter name; more than one where several parts on this rank hold a copy of the same parameter."""
    states: dict[str, list[dict[str, Any]]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter not in names:
                shape = list(parameter.shape)
                raise ConfigError(f"optimizer.param_groups.{index} has a parameter {shape}: must be one of the model's")
            if optimizer.state.get(parameter):
                states.setdefault(names[parameter], []).append(optimizer.state[parameter])
    return states


def _named_groups(optimizer: Optimizer, names: dict[torch.Tensor, str]) -> list[dict[str, Any]]:
    """The groups with names for parameters: those of all ranks, since pipeline stages hold different ones."""
    own = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    everyone = ranks.gather(own)
    for other, groups in enumerate(everyone):
        if len(groups) != len(own):
            raise ConfigError(
                f"optimizer.param_groups has length {len(own)} on rank {ranks.rank()} "
                f"and {len(groups)} on rank {other}: must be the same on all"
            )
    union = [list(dict.fromkeys(name for groups in everyone for name in groups[i])) for i in range(len(own))]
    return [{**group, "params": params} for group, params in zip(optimizer.param_groups, union)]


def _require_values_on_main(
    state: dict[str, dict[str, Any]], names: dict[torch.Tensor, str], groups: list[dict[str, Any]]
) -> None:
    # Values that are not tensors are written by rank 0 alone, which under pipeline parallelism lacks those of others.
    own, everyone = set(names.values()), {name for group in groups for name in group["params"]}
    for name, values in state.items():
        for key, value in values.items():
            if not isinstance(value, torch.Tensor) and not everyone <= own:
                raise ConfigError(
                    f"optimizer state of {name}.{key} is {value!r}: must be a tensor with pipeline stages"
                )


def _compare_groups(current: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    if len(current) != len(saved):
        raise ConfigError(
            f"optimizer.param_groups has length {len(current)}: must be {len(saved)} as in the checkpoint"
        )
    for index, (group, saved_group) in enumerate(zip(current, saved)):
        different = sorted(set(group["params"]) ^ set(saved_group["params"]))
        if different:
            raise ConfigError(f"optimizer.param_groups.{index} differs from the checkpoint's in {different[0]}")


def _compare_states(current: dict[str, list[dict[str, Any]]], saved: dict[str, dict[str, Any]]) -> None:
    if current.keys() != saved.keys():
        names = sorted(current.keys() ^ saved.keys())
        raise ConfigError(f"optimizer state of {names[0]} is in only one of checkpoint and run: must be in both")
    for name, values in saved.items():
        for state in current[name]:
            if values.keys() != state.keys():
                raise ConfigError(f"optimizer state of {name} is {sorted(state)}: must be {sorted(values)}")
            for key, value in values.items():
                _compare_shapes(f"{name}.{key}", state[key], value, "optimizer state of ")


def _compare_model(current: dict[str, list[torch.Tensor]], saved: dict[str, torch.Tensor]) -> None:
    if current.keys() != saved.keys():
        name = min(current.keys() ^ saved.keys())
        where = "run" if name in current else "checkpoint"
        raise ConfigError(f"the checkpoint is of another model: {name} is only in the {where}")
    for name, tensors in current.items():
        for tensor in tensors:
            _compare_shapes(name, tensor, saved[name], "the checkpoint is of another model: ")


def _compare_shapes(name: str, current: Any, saved: Any, what: str) -> None:
    if isinstance(current, torch.Tensor) != isinstance(saved, torch.Tensor):
        raise ConfigError(f"{what}{name} is a tensor in only one of checkpoint and run: must be in both")
    if isinstance(current, torch.Tensor):
        shape, wanted = list(stored_form(name, current).shape), list(stored_form(name, saved).shape)
        if shape != wanted:
            raise ConfigError(f"{what}{name} has shape {shape}: must be {wanted}")


def _copy(name: str, target: torch.Tensor, source: torch.Tensor) -> None:
    from torch.distributed.tensor import DTensor

    target, source = stored_form(name, target), stored_form(name, source)
    if isinstance(target, DTensor) and isinstance(source, DTensor) and target.placements == source.placements:
        target, source = target.to_local(), source.to_local()
    target.copy_(source)


def _init_optimizer_state(optimizer: Optimizer) -> None:
    """Give every trainable parameter that has no state the one its first step would start from."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in parameters if p.requires_grad and not optimizer.state.get(p)]
    if not new:
        return
    # A plain zero step is not enough: gradients may be present, others may have state already, and the step counts
    # would be left at 1, so that a run that asked for its state before training would train differently.
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
