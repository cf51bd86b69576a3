"""The few collectives a checkpoint needs. Without an initialised process group each is a plain call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether a process group is initialised."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if is_distributed() else 0


def gather(item: T) -> list[T]:
    """`item` of every rank, in rank order, on every rank."""
    if not is_distributed():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def on_main(function: Callable[[], T]) -> T:
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
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
