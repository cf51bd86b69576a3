"""The few collectives a checkpoint needs. Without an initialised process group each is a plain call.

`group` is a process group of all ranks; None is the default one. A save in the background uses a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
Group = Any  # dist.ProcessGroup | None; the class is absent from builds without distributed


def is_distributed() -> bool:
    """Whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if is_distributed() else 1


def new_cpu_group() -> Group:
    """A group of all ranks for CPU tensors, apart from the default one; None without a process group. Collective."""
    return dist.new_group(backend="gloo") if is_distributed() else None


def gather(item: T, group: Group = None) -> list[T]:
    """`item` of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [item]
    items: list[Any] = [None] * size()
    dist.all_gather_object(items, item, group=group)
    return items


def on_main(function: Callable[[], T], group: Group = None) -> T:
    """Call `function` on rank 0; every rank returns its result, or raises its exception.

    Also a barrier: no rank returns before rank 0 is done.
    """
    if not is_distributed():
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # also a bug must reach the other ranks, or they wait for ever
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_each(function: Callable[[], T], group: Group = None) -> T:
    """Call `function` on every rank and return this rank's result; if it fails on any, every rank raises the
    exception of the lowest such rank. Also a barrier."""
    if not is_distributed():
        return function()
    result: Any = None
    problem: Exception | None = None
    try:
        result = function()
    except Exception as error:
        problem = error
    raise_first(problem, group)
    return result


def raise_first(problem: Exception | None, group: Group = None) -> None:
    """Raise the problem of the lowest rank that has one, on every rank."""
    for first in gather(problem, group):
        if first is not None:
            raise first
