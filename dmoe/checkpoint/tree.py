"""A training state is nested dicts and lists; tensors go to DCP and everything else to JSON.

Keeping plain values out of DCP keeps pickles out of the checkpoint: DCP pickles what is not a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dmoe.errors import ConfigError

Tree = dict[str, Any]


def split(state: Tree, where: str = "") -> tuple[Tree, Tree]:
    """Part `state` into (tensors, values), two nested dicts with the keys of `state`.

    A list or tuple that holds tensors or dicts becomes a dict with the keys "0", "1", ...; the tensors are the same
    objects. Raises TypeError for a key that is not a string and for a value that JSON cannot hold.
    """
    tensors: Tree = {}
    values: Tree = {}
    for key, item in state.items():
        if not isinstance(key, str):
            raise TypeError(f"checkpoint key {key!r} in {where or 'the state'} is not a string")
        name = where + key
        if isinstance(item, torch.Tensor):
            tensors[key] = item
        elif _is_branch(item):
            tensors_below, values_below = split(dict(_children(item)), name + ".")
            if tensors_below:
                tensors[key] = tensors_below
            if values_below:
                values[key] = values_below
        else:
            try:
                values[key] = json.loads(json.dumps(item))
            except TypeError as error:
                raise TypeError(f"checkpoint value {name} is neither a tensor nor JSON: {error}") from error
    return tensors, values


def fill(state: Tree | list[Any], values: Tree, where: str = "") -> None:
    """Put `values`, the second result of `split`, into `state` in place; its tensors stay.

    A value that only one of them has stays or is added (options of parameter groups come and go with torch versions
    and schedulers). Raises ConfigError for a list of dicts that has another length.
    """
    if isinstance(state, dict):
        state.update({key: value for key, value in values.items() if key not in state})
    for key, item in _children(state):
        if isinstance(item, torch.Tensor):
            continue
        name = where + key
        index: Any = int(key) if isinstance(state, list) else key
        if _is_branch(item):
            below = values.get(key, {})
            if not isinstance(item, dict) and len(below) != len(item):
                raise ConfigError(f"{name} has length {len(item)}: must be {len(below)}, as in the checkpoint")
            branch = list(item) if isinstance(item, tuple) else item
            fill(branch, below, name + ".")
            state[index] = tuple(branch) if isinstance(item, tuple) else branch
        elif key in values:
            state[index] = tuple(values[key]) if isinstance(item, tuple) else values[key]


def map_tensors(tensors: Tree, function: Callable[[str, torch.Tensor], torch.Tensor], where: str = "") -> Tree:
    """A tree of the same form with `function(dotted name, tensor)` in place of each tensor."""
    return {
        key: map_tensors(item, function, f"{where}{key}.") if isinstance(item, dict) else function(where + key, item)
        for key, item in tensors.items()
    }


def flatten(tensors: Tree, where: str = "") -> dict[str, torch.Tensor]:
    """The tensors by dotted name, as DCP names them."""
    flat: dict[str, torch.Tensor] = {}
    for key, item in tensors.items():
        if isinstance(item, dict):
            flat.update(flatten(item, f"{where}{key}."))
        else:
            flat[where + key] = item
    return flat


def _children(node: Any) -> Iterator[tuple[str, Any]]:
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, item in list(pairs):
        yield (key if isinstance(node, dict) else str(key)), item


def _is_branch(item: Any) -> bool:
    if isinstance(item, (list, tuple)):
        return any(isinstance(x, (dict, torch.Tensor)) for x in item)
    return isinstance(item, dict) and bool(item)
