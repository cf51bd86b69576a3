"""Copies of tokens grouped by expert: making them, adding them up again, and the gradient of the weights in between.

Legend: T tokens, k = top_k picks a token, N = T*k picks, E experts, H width, S rows ("slots") of the grouped buffer.
Pick p is the pick p % k of token p // k. The gather and scatter operators differ only in where a copy lies.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.config import require
from dmoe.ops.permute import sum_picks
from dmoe.ops.precision import autocast_dtype


class Placement(NamedTuple):
    """Where the copies lie: number r in the order of the experts is of pick `picks_N[r]`, in row `slots_N[r]`."""

    picks_N: Tensor
    """int64."""
    slots_N: Tensor | None
    """int64; `num_slots` for a copy that is dropped. None: row r."""
    num_slots: int
    top_k: int
    drops: bool
    """Whether copies may be dropped."""


def dense_placement(indices: Tensor, top_k: int) -> Placement:
    """One copy after the other."""
    _check_picks(indices, top_k)
    return Placement(indices.long(), None, indices.numel(), top_k, False)


def padded_placement(
    indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor, top_k: int, num_slots: int
) -> Placement:
    """The copies of expert e begin where `padded_bins` says that its predecessor ends."""
    _check_picks(indices, top_k)
    require(bin_ids.shape == indices.shape, "bin_ids.shape", tuple(bin_ids.shape), f"{tuple(indices.shape)}")
    _check_bins("bins", bins)
    require(padded_bins.shape == bins.shape, "padded_bins.shape", tuple(padded_bins.shape), f"{tuple(bins.shape)}")
    shift_E = F.pad((padded_bins.long() - bins.long())[:-1], (1, 0))
    numbers_N = torch.arange(indices.numel(), device=indices.device)
    return Placement(indices.long(), numbers_N + shift_E[bin_ids.long()], num_slots, top_k, False)


def binned_placement(indices: Tensor, bins: Tensor, capacity: int, top_k: int) -> Placement:
    """Every expert has `capacity` rows; its copies past these are dropped."""
    _check_picks(indices, top_k)
    _check_bins("bins", bins)
    require(capacity >= 0, "expert_capacity", capacity, "0 or greater")
    numbers_N, ends_E = torch.arange(indices.numel(), device=indices.device), bins.long()
    experts_N = torch.searchsorted(ends_E, numbers_N, right=True)
    places_N = numbers_N - F.pad(ends_E, (1, 0))[experts_N]
    kept_N = (places_N < capacity) & (experts_N < ends_E.numel())
    num_slots = ends_E.numel() * capacity
    slots_N = torch.where(kept_N, experts_N * capacity + places_N, num_slots)
    return Placement(indices.long(), slots_N, num_slots, top_k, True)


def _check_picks(indices: Tensor, top_k: int) -> None:
    require(indices.dim() == 1, "indices.shape", tuple(indices.shape), "[tokens * top_k]")
    require(top_k >= 1, "top_k", top_k, "1 or greater")
    if indices.numel() % top_k != 0:
        require(False, "indices.shape", tuple(indices.shape), f"a multiple of top_k, {top_k}")


def _check_bins(name: str, bins: Tensor) -> None:
    # A sum over one expert comes out of MegaBlocks' `inclusive_cumsum` without a dim.
    require(bins.dim() == 1 and bins.numel() > 0, f"{name}.shape", tuple(bins.shape), "[experts], at least 1")


def _check_rows(x: Tensor, num_rows: int, what: str) -> None:
    if x.dim() != 2 or x.shape[0] != num_rows:
        require(False, "x.shape", tuple(x.shape), f"[{num_rows}, width], {what}")
    require(x.dtype.is_floating_point, "x.dtype", x.dtype, "a floating-point dtype")


def _check_weights(weights: Tensor | None, placement: Placement) -> None:
    if weights is not None and weights.shape != placement.picks_N.shape:
        require(False, "weights.shape", tuple(weights.shape), f"{tuple(placement.picks_N.shape)}, one for each index")


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _times(rows: Tensor, weights: Tensor | None) -> Tensor:
    """The rows times their weights: in fp32 (fp64 for fp64), then rounded to the dtype of the rows."""
    return rows if weights is None else (_wide(rows) * _wide(weights).unsqueeze(1)).to(rows.dtype)


def copy_rows(x_TH: Tensor, weights_N: Tensor | None, placement: Placement) -> Tensor:
    """[S, H]: each copy, times the weight of its pick; rows that no copy takes are zero."""
    picks_N, slots_N, num_slots, top_k, drops = placement
    _check_rows(x_TH, picks_N.numel() // top_k, "a row for each token")
    _check_weights(weights_N, placement)
    copies_NH = _times(x_TH.index_select(0, picks_N // top_k), None if weights_N is None else weights_N[picks_N])
    if slots_N is None:
        return copies_NH
    # What is dropped goes to one more row at the end.
    buffer = x_TH.new_zeros(num_slots + drops, x_TH.shape[1]).index_copy_(0, slots_N, copies_NH)
    return buffer[:num_slots]


def _rows_of_picks(x_SH: Tensor, placement: Placement) -> tuple[Tensor, Tensor | None]:
    """[N, H], in the order of the picks, and bool [N]: whether the pick was dropped; its row then has any value."""
    slots_N = slots_of_picks(placement)
    if not placement.drops:
        return x_SH.index_select(0, slots_N), None
    if placement.num_slots == 0:
        return x_SH.new_zeros(slots_N.numel(), x_SH.shape[1]), torch.ones_like(slots_N, dtype=torch.bool)
    return x_SH.index_select(0, slots_N.clamp(max=placement.num_slots - 1)), slots_N == placement.num_slots


def slots_of_picks(placement: Placement) -> Tensor:
    """int64 [N]: the row of each pick's copy."""
    picks_N, slots_N = placement.picks_N, placement.slots_N
    if slots_N is None:
        slots_N = torch.arange(picks_N.numel(), device=picks_N.device)
    return torch.empty_like(picks_N).scatter_(0, picks_N, slots_N)


def add_rows(x_SH: Tensor, weights_N: Tensor | None, placement: Placement) -> Tensor:
    """[T, H]: the sum of each token's copies, each times its weight and rounded first; what was dropped adds 0."""
    _check_rows(x_SH, placement.num_slots, "a row for each copy")
    _check_weights(weights_N, placement)
    top_k = placement.top_k
    if weights_N is None and not placement.drops:
        return sum_picks(x_SH, slots_of_picks(placement).view(-1, top_k))
    rows_NH, dropped_N = _rows_of_picks(x_SH, placement)
    rows_NH = _times(rows_NH, weights_N)
    if dropped_N is not None:
        rows_NH = rows_NH.masked_fill(dropped_N.unsqueeze(1), 0)
    # The dtype is said, because autocast would make the sum one of fp32.
    return rows_NH if top_k == 1 else rows_NH.unflatten(0, (-1, top_k)).sum(dim=1, dtype=x_SH.dtype)


def weight_gradient(x_SH: Tensor, grad_TH: Tensor, placement: Placement) -> Tensor:
    """[N] in the dtype of x: for each pick <its row, the gradient of its token>, in fp32; 0 for what was dropped."""
    _check_rows(x_SH, placement.num_slots, "a row for each copy")
    rows_NH, dropped_N = _rows_of_picks(x_SH, placement)
    grad_NH = grad_TH.repeat_interleave(placement.top_k, dim=0)
    dots_N = (_wide(rows_NH) * _wide(grad_NH)).sum(dim=1).to(x_SH.dtype)
    return dots_N if dropped_N is None else dots_N.masked_fill(dropped_N, 0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *placement: Any) -> Tensor:
        ctx.save_for_backward(*placement[:2])
        ctx.rest = placement[2:]
        return copy_rows(x, None, Placement(*placement))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return add_rows(grad, None, Placement(*ctx.saved_tensors, *ctx.rest)), *[None] * len(Placement._fields)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None, *placement: Any) -> Tensor:
        # The rows are needed for the gradient of the weights alone.
        ctx.save_for_backward(*placement[:2], weights, x if ctx.needs_input_grad[1] else None)
        ctx.rest = placement[2:]
        return add_rows(x, weights, Placement(*placement))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        picks_N, slots_N, weights, x = ctx.saved_tensors
        placement = Placement(picks_N, slots_N, *ctx.rest)
        grad_x = copy_rows(grad, weights, placement) if ctx.needs_input_grad[0] else None
        grad_weights = weight_gradient(x, grad, placement) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weights, *[None] * len(Placement._fields)


def gather_rows(x_TH: Tensor, placement: Placement) -> Tensor:
    """`copy_rows` without weights, differentiable, in the autocast dtype where that is on."""
    return _Gather.apply(x_TH.to(autocast_dtype(x_TH)), *placement)


def scatter_rows(x_SH: Tensor, weights_N: Tensor | None, placement: Placement) -> Tensor:
    """`add_rows`, differentiable in rows and weights, both in the autocast dtype where that is on."""
    weights_N = None if weights_N is None else weights_N.to(autocast_dtype(weights_N))
    return _Scatter.apply(x_SH.to(autocast_dtype(x_SH)), weights_N, *placement)
