"""Differentiable collectives on rows, whose backward is the opposite collective; reductions; leaving a group."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _wait(tensor: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(tensor)


def _gather(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    size, name = group.size(), group.group_name
    return _wait(torch.ops._c10d_functional.all_gather_into_tensor(rows.contiguous(), size, name))


def _reduce_scatter(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    size, name = group.size(), group.group_name
    return _wait(torch.ops._c10d_functional.reduce_scatter_tensor(rows.contiguous(), "sum", size, name))


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(rows, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.group), None


def all_gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[W * R, ...]: the rows [R, ...] of every rank of `group`, in the order of the ranks; R is the same on all."""
    return _AllGatherRows.apply(rows, group)


def reduce_scatter_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[R, ...]: of the sum over the ranks of `rows` [W * R, ...], the part of this rank."""
    return _ReduceScatterRows.apply(rows, group)


def start_all_reduce(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of `values` over `group`, under way: pass the result to `finish_all_reduce` before reading it."""
    return torch.ops._c10d_functional.all_reduce(values, "sum", group.group_name)


def finish_all_reduce(values: Tensor) -> Tensor:
    """Wait for `start_all_reduce`."""
    return _wait(values)


def leave_process_group() -> None:
    """Destroy the default process group, so that the process may end right after.

    A thread of gloo lets go of the last collective's tensors a moment after it is done, and needs Python's lock for it.
    If the interpreter is ending by then, torch aborts the process: "terminate called without an active exception".
    """
    dist.destroy_process_group()
    time.sleep(0.1)  # without the lock
