"""The exchange of rows between ranks, with a handle to wait for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.errors import ConfigError
from dmoe.ops import all_to_all as row_exchange


class Handle:
    """An exchange under way: its result may be read after `wait()`."""

    def __init__(self, out: Tensor) -> None:
        self._out: Tensor | None = out

    def wait(self) -> bool:
        """Wait until the rows are there (on a GPU: make the current stream wait). True; later calls do nothing."""
        if self._out is not None:
            torch.ops._c10d_functional.wait_tensor(self._out)
            self._out = None
        return True


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, output_splits: list[int], input_splits: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.output_splits, ctx.input_splits, ctx.group = output_splits, input_splits, group
        return torch.ops._c10d_functional.all_to_all_single(
            x.contiguous(), output_splits, input_splits, group.group_name
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = row_exchange.all_to_all(grad, ctx.output_splits, ctx.input_splits, ctx.group)
        return back, None, None, None


def all_to_all(
    x: Tensor,
    output_split_sizes: list[int],
    input_split_sizes: list[int],
    group: dist.ProcessGroup | None,
    async_op: bool = False,
) -> tuple[Tensor, Handle | None]:
    """Send each rank of `group` its block of rows. Collective; differentiable, and the backward is collective too.

    Args:
        x: [sum(input_split_sizes), ...] of any dtype; see `dmoe.ops.all_to_all.all_to_all`.
        output_split_sizes, input_split_sizes: rows received from and sent to each rank.
        group: None is the default group.
        async_op: do not wait: the result must not be read before `handle.wait()`. Dtypes that travel as bytes (fp8,
            bool, int16) are waited for all the same.

    Returns:
        (out, handle): [sum(output_split_sizes), ...] and None, or with `async_op` the handle.

    Raises:
        ConfigError: the sizes do not fit the rows or the group.
    """
    output_splits, input_splits = list(output_split_sizes), list(input_split_sizes)
    if not async_op:
        return row_exchange.all_to_all(x, input_splits, output_splits, group), None
    if x.dtype not in row_exchange.NATIVE_DTYPES:
        out = row_exchange.all_to_all(x, input_splits, output_splits, group)
        return out, Handle(out)
    row_exchange.check_counts(x, input_splits, output_splits, dist.get_world_size(group))
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ConfigError("group is None: must be a process group, or init_process_group must have been called")
    out = _StartExchange.apply(x, output_splits, input_splits, group)
    return out, Handle(out.detach())
