"""Token permutation: group the T*K routed rows by expert, and put their results back.

A pick may be of no expert, with the id E: then no row of an expert belongs to it.

Legend: T tokens, K picks a token, R = T*K routed rows, E experts, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.platform import on_its_device, runs_triton


class Permutation(NamedTuple):
    """Rows sorted by expert; within an expert, by token. Rows of no expert come last, unless they were cut off."""

    order_R: Tensor
    """int64, from the Triton sort int32: sorted row r is pick `order_R[r]` of the flattened [T*K] picks, so its token
    is `order_R[r] // K`; a row that only pads (`pad_groups`) has T*K. After the last expert's rows it is any pick."""
    inverse_TK: Tensor
    """In the same dtype: the sorted row that holds pick k of token t; R, the row after the last, for no expert."""
    offsets_E: Tensor
    """int32: expert e owns the sorted rows offsets_E[e-1] .. offsets_E[e]-1."""


def sort_by_expert(topk_ids_TK: Tensor, num_experts: int) -> Permutation:
    """Permutation that groups picks by expert. No host synchronisation, no data-dependent shape.

    Args:
        topk_ids_TK: integer expert ids in [0, num_experts]; the last of them is no expert.
    """
    flat = topk_ids_TK.reshape(-1)
    ids_R, order_R = torch.sort(flat, stable=True)
    rows = torch.arange(flat.numel(), device=flat.device)
    inverse = torch.empty_like(order_R).scatter_(0, order_R, rows).masked_fill_(flat >= num_experts, flat.numel())
    experts = torch.arange(num_experts, device=flat.device, dtype=ids_R.dtype)
    offsets = torch.searchsorted(ids_R, experts, right=True, out_int32=True)
    return Permutation(order_R, inverse.view(topk_ids_TK.shape), offsets)


def first_rows(permutation: Permutation, num_rows: int) -> Permutation:
    """The permutation without the rows of no expert, when the experts have `num_rows` rows: R becomes that."""
    order_R, inverse_TK, offsets_E = permutation
    return Permutation(order_R.narrow(0, 0, num_rows), inverse_TK.clamp(max=num_rows), offsets_E)


def pad_groups(permutation: Permutation, sizes_E: Tensor) -> Permutation:
    """The same permutation with `sizes_E[e]` rows for expert e, at least as many as it has; the added ones come last.

    The number of rows depends on the data: the sizes are read on the host.

    Args:
        permutation: without rows of no expert (`first_rows`).
    """
    order_R, inverse_TK, offsets_E = permutation
    num_rows = order_R.numel()
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    ends_E = sizes_E.cumsum(0)
    # A row moves by as much as was added to the experts before its own.
    shift_E = (ends_E - sizes_E) - (offsets_E - counts_E)
    slots_R = torch.arange(num_rows, device=order_R.device) + shift_E.repeat_interleave(counts_E)
    num_slots = int(ends_E[-1])
    padded_order = order_R.new_full((num_slots,), inverse_TK.numel()).index_copy_(0, slots_R, order_R)
    slots = F.pad(slots_R, (0, 1), value=num_slots)  # of picks of no expert too
    return Permutation(padded_order, slots[inverse_TK], ends_E.to(offsets_E.dtype))


def sum_picks(y_RD: Tensor, inverse_TK: Tensor) -> Tensor:
    """y_TD[t] = sum over k of y_RD[inverse_TK[t, k]], added in the order of k with fp32 accumulation.

    The order is fixed, so a token's sum has the same bits whatever else is in the batch. Not differentiable. Every
    index must be that of a row: picks of no expert need one more, of zeros.
    """
    if inverse_TK.numel() == 0:
        return y_RD.new_zeros(inverse_TK.shape[0], y_RD.shape[1])
    # embedding_bag reads every row once and writes T rows; gather-then-sum would write R rows in between.
    return F.embedding_bag(inverse_TK, y_RD, mode="sum")


def sum_real_picks(y_RD: Tensor, inverse_TK: Tensor) -> Tensor:
    """`sum_picks` of rows of experts alone (`first_rows`), without those of index R.

    With fewer rows than picks the picks of a token are put next to each other, so that no row of zeros is needed, which
    would copy the others. Inside the compiler, which does not know how many rows there are, always.
    """
    num_rows = y_RD.shape[0]
    if y_RD.is_cuda and y_RD.dtype != torch.float64 and runs_triton(y_RD.device):
        # Outside the compiler without the operator, which takes the host as long as the launch.
        return (_sum_picks_triton if torch.compiler.is_compiling() else _launch_sum_picks)(y_RD, inverse_TK)
    if inverse_TK.numel() == 0 or not (torch.compiler.is_compiling() or num_rows < inverse_TK.numel()):
        return sum_picks(y_RD, inverse_TK)
    kept_TK = inverse_TK < num_rows
    ends_TK = kept_TK.flatten().cumsum(0).view(inverse_TK.shape)
    places_TK = torch.where(kept_TK, ends_TK - 1, num_rows)
    rows = inverse_TK.new_empty(num_rows + 1).scatter_(0, places_TK.flatten(), inverse_TK.flatten())
    starts_T = (ends_TK - kept_TK.long())[:, 0]
    return F.embedding_bag(rows.narrow(0, 0, num_rows), y_RD, starts_T, mode="sum")


@on_its_device
def _launch_sum_picks(y_RD: Tensor, inverse_TK: Tensor) -> Tensor:
    from dmoe.ops.kernels.rows import sum_picks_triton  # Triton is imported when it is needed

    return sum_picks_triton(y_RD.contiguous(), inverse_TK)


_sum_picks_triton = torch.library.custom_op("dmoe::sum_picks", _launch_sum_picks, mutates_args=())


@_sum_picks_triton.register_fake
def _(y_RD: Tensor, inverse_TK: Tensor) -> Tensor:
    return y_RD.new_empty(inverse_TK.shape[0], y_RD.shape[1])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor, early: Tensor | None) -> Tensor:
        if early is not None:
            return early.narrow(0, 0, order_R.shape[0])
        return x_TD.index_select(0, order_R // inverse_TK.shape[1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return sum_real_picks(grad_RD, ctx.saved_tensors[0]), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(y_RD: Tensor, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
        return sum_real_picks(y_RD, inverse_TK)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, order_R, inverse_TK = inputs
        ctx.save_for_backward(order_R)
        ctx.top_k = inverse_TK.shape[1]

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None]:
        return grad_TD.index_select(0, ctx.saved_tensors[0] // ctx.top_k), None, None


def sort_early(topk_ids_TK: Tensor, num_experts: int) -> Permutation:
    """`sort_by_expert`, on a GPU in a few launches; its indices may then be int32."""
    if not runs_kernels(topk_ids_TK) or topk_ids_TK.numel() >= 2**31:
        return sort_by_expert(topk_ids_TK, num_experts)
    from dmoe.ops.kernels.sorting import counting_sort  # Triton is imported when it is needed

    return on_its_device(counting_sort)(topk_ids_TK, num_experts)


@torch.no_grad()
def gather_early(x_TD: Tensor, permutation: Permutation, max_rows: int) -> Tensor | None:
    """What `gather_rows` will return, before it is known how many rows are of experts: a GPU can copy them while the
    host waits for that number. None where there is no such waiting.

    Args:
        permutation: with rows of no expert.
        max_rows: of an expert, at most.

    Returns:
        [max_rows, D], of which rows of no expert hold anything.
    """
    if not runs_kernels(x_TD):
        return None
    from dmoe.ops.kernels.rows import spread_rows

    return on_its_device(spread_rows)(x_TD.contiguous(), permutation.inverse_TK, num_rows=max_rows)


def runs_kernels(tensor: Tensor) -> bool:
    """Whether Triton kernels may be launched on `tensor` right here, not as operators inside the compiler."""
    return tensor.is_cuda and not torch.compiler.is_compiling() and runs_triton(tensor.device)


def gather_rows(x_TD: Tensor, permutation: Permutation, early: Tensor | None = None) -> Tensor:
    """[R, D]: the token of each sorted row. Differentiable; the backward is `sum_rows`, so it is deterministic.

    Args:
        permutation: if picks may be of no expert, without their rows (`first_rows`); for `sum_rows` too.
        early: of `gather_early`, whose memory the result takes over.
    """
    return _GatherRows.apply(x_TD, permutation.order_R, permutation.inverse_TK, early)


def sum_rows(y_RD: Tensor, permutation: Permutation) -> Tensor:
    """[T, D]: the sum of each token's K rows, as `sum_picks`. Differentiable; the backward is `gather_rows`."""
    return _SumRows.apply(y_RD, permutation.order_R, permutation.inverse_TK)
