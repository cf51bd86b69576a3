"""The modules of this rank (one, or one a virtual pipeline stage) and the plain names of what they hold."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn

Parts = nn.Module | Sequence[nn.Module]

# What torch puts into names when it wraps a module: torch.compile and activation checkpointing.
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")


def as_parts(model: Parts) -> list[nn.Module]:
    """The modules as a list, each in its sharded state if FSDP2 gathered it (an evaluation may leave it so)."""
    parts = [model] if isinstance(model, nn.Module) else list(model)
    parts = [part.module if isinstance(part, nn.parallel.DistributedDataParallel) else part for part in parts]
    from torch.distributed.fsdp import FSDPModule

    for part in parts:
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
    return parts


def model_tensors(parts: list[nn.Module]) -> dict[str, list[torch.Tensor]]:
    """Parameters and persistent buffers by plain name, detached; tied ones under each name.

    A list has more than one tensor where several parts hold a copy of the same one (embeddings that the first and the
    last pipeline stage share, both on this rank).
    """
    tensors: dict[str, list[torch.Tensor]] = {}
    for part in parts:
        for name, tensor in part.state_dict().items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} is extra state of a module, which a checkpoint does not hold")
            tensors.setdefault(plain_name(name), []).append(tensor)
    return tensors


def parameter_names(parts: list[nn.Module]) -> dict[torch.Tensor, str]:
    """The plain name of each parameter; a tied one has the first of its names."""
    names: dict[torch.Tensor, str] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            names.setdefault(parameter, plain_name(name))
    return names


def plain_name(name: str) -> str:
    """The name without what wrappers put into it, so that a run may turn them on or off."""
    return _WRAPPERS.sub("", name)
