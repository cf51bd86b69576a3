"""Uneven, differentiable all-to-all of rows between the ranks of a process group.

Legend: W ranks of the group, R rows, e experts of one rank. Rank r's row block p goes to rank p.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from dmoe.errors import ConfigError

# What gloo and NCCL both move as they are. The rest (fp8, bool, int16, ...) travels as bytes.
NATIVE_DTYPES = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64}
)


def all_to_all(
    rows_RC: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """Send each rank of `group` its block of rows; return the blocks received, in the order of the senders.

    Every rank of the group must call it, and what rank a sends to b must be what b expects from a (`exchange_counts`);
    no rank can check that alone, and a mismatch fails in the backend or times out. The backward pass sends the
    gradient rows back with the counts swapped, so either all ranks or none run it.

    Args:
        rows_RC: [sum(send_counts), ...] of any dtype; block p (`send_counts[p]` rows) goes to rank p. It need not be
            contiguous. Dtypes other than `NATIVE_DTYPES`, fp8 among them, are sent as bytes and have no gradient.
        send_counts: W row counts, zero allowed.
        receive_counts: W row counts; block p of the result comes from rank p.
        group: None is the default group.

    Returns:
        [sum(receive_counts), ...], dtype and device of `rows_RC`, contiguous.

    Raises:
        ConfigError: the counts fit neither the rows nor the group's size, or the rows need a gradient and their dtype
            has none. Counts are not checked inside torch.compile, where they may be symbols.
    """
    if not torch.compiler.is_compiling():
        check_counts(rows_RC, send_counts, receive_counts, dist.get_world_size(group))
    if rows_RC.dtype in NATIVE_DTYPES:
        return _exchange(rows_RC, send_counts, receive_counts, group)
    if rows_RC.requires_grad:
        raise ConfigError(
            f"rows_RC is {rows_RC.dtype} and requires a gradient: must be detached, or of a dtype that is not sent as "
            "bytes (float32, float64, float16, bfloat16)"
        )
    # Flat rows: `.view(uint8)` multiplies the last dim, which of a 1-D tensor would be the rows themselves.
    flat_RC = rows_RC.reshape(rows_RC.shape[0], math.prod(rows_RC.shape[1:]))
    if flat_RC.element_size() > 1:
        # That view wants a last stride of 1, which `.contiguous()` does not give to rows of width 1 or to no rows.
        flat_RC = flat_RC.clone(memory_format=torch.contiguous_format)
    bytes_RB = flat_RC.view(torch.uint8)
    received_RB = _exchange(bytes_RB, send_counts, receive_counts, group)
    return received_RB.view(rows_RC.dtype).reshape(received_RB.shape[0], *rows_RC.shape[1:])


def exchange_counts(send_counts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """One exchange of counts: row p of the result is what rank p wants to send to this rank.

    Args:
        send_counts: int64 [W] or [W, e], on the group's device: rows for each rank, or for each expert of each rank.

    Returns:
        int64, the same shape. No host synchronisation.

    Raises:
        ConfigError: wrong dtype, or a first dim that is not the group's size.
    """
    world_size = dist.get_world_size(group)
    if send_counts.dtype != torch.int64:
        raise ConfigError(f"send_counts is {send_counts.dtype}: must be torch.int64")
    if send_counts.dim() not in (1, 2) or send_counts.shape[0] != world_size:
        raise ConfigError(
            f"send_counts has shape {list(send_counts.shape)}: must be [{world_size}] or [{world_size}, e], "
            "a row for each rank of the group"
        )
    ones = [1] * world_size
    name = _known(group).group_name
    received = torch.ops._c10d_functional.all_to_all_single(send_counts.contiguous(), ones, ones, name)
    return torch.ops._c10d_functional.wait_tensor(received)


def _exchange(
    rows: Tensor, send_counts: list[int], receive_counts: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    # The collective reads raw memory, so strides would be lost.
    received = funcol.all_to_all_single_autograd(rows.contiguous(), receive_counts, send_counts, _known(group))
    # A plain tensor: the lazily waited subclass does not pass through custom kernels.
    return funcol.wait_tensor(received)


def _known(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    group = dist.group.WORLD if group is None else group
    if group is None:
        raise ConfigError("group is None: must be a process group, or init_process_group must have been called")
    return group


def check_counts(rows: Tensor, send_counts: list[int], receive_counts: list[int], world_size: int) -> None:
    if rows.dim() == 0:
        raise ConfigError("rows_RC has shape []: must have at least one dim, the rows")
    for name, counts in (("send_counts", send_counts), ("receive_counts", receive_counts)):
        if len(counts) != world_size:
            raise ConfigError(f"{name} is {counts}: must have {world_size} entries, one for each rank of the group")
        if min(counts) < 0:
            raise ConfigError(f"{name} is {counts}: must be 0 or greater")
    if sum(send_counts) != rows.shape[0]:
        raise ConfigError(
            f"send_counts is {send_counts}, in sum {sum(send_counts)}: must add up to the {rows.shape[0]} rows"
        )
