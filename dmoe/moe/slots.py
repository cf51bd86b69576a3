"""Experts that take a fixed number of tokens: C slots each, some of them empty.

Used where experts choose their tokens, and where every expert is padded to its capacity. Shapes do not depend on the
data. Empty slots are rows of zeros: computed, and left out of every sum.

Legend: T tokens, E experts, C slots an expert, R = E * C, K picks a token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.permute import sum_picks


class Slots(NamedTuple):
    """Who is where."""

    tokens_EC: Tensor
    """int64: the token in each slot; T for an empty one."""
    weights_EC: Tensor
    """Its routing weight; 0 for an empty slot."""
    picks_TK: Tensor | None = None
    """int64: the slot of each pick, counted over all experts; R if it has none. None where experts chose, so that a
    token may be in any number of slots."""


def slots_of_picks(topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_experts: int, capacity: int) -> Slots:
    """Put picks into slots in the order of the tokens, those of expert E into none; at most `capacity` an expert."""
    num_slots, (num_tokens, top_k) = num_experts * capacity, topk_ids_TK.shape
    ids_R, order_R = topk_ids_TK.flatten().sort(stable=True)
    firsts = torch.searchsorted(ids_R, torch.arange(num_experts + 1, device=ids_R.device))
    places_R = torch.arange(ids_R.numel(), device=ids_R.device) - firsts[ids_R]
    sorted_slots_R = torch.where(ids_R < num_experts, ids_R * capacity + places_R, num_slots)
    picks_R = torch.empty_like(order_R).scatter_(0, order_R, sorted_slots_R)
    tokens = order_R.new_full((num_slots + 1,), num_tokens)
    tokens[picks_R] = torch.arange(num_tokens, device=tokens.device).repeat_interleave(top_k)
    tokens[num_slots] = num_tokens  # where picks of no expert went
    weights = topk_weights_TK.new_zeros(num_slots + 1).index_put((picks_R,), topk_weights_TK.flatten())
    shape = (num_experts, capacity)
    return Slots(tokens[:-1].view(shape), weights[:-1].view(shape), picks_R.view(topk_ids_TK.shape))


def take_rows(x_TD: Tensor, slots: Slots) -> Tensor:
    """[R, D]: the token of each slot, zeros for empty ones. Differentiable."""
    return _TakeRows.apply(x_TD, slots.tokens_EC.flatten(), slots.picks_TK)


def sum_slots(y_RD: Tensor, slots: Slots, num_tokens: int) -> Tensor:
    """[T, D]: the sum of the slots of each token, in fp32: of picks in their order, of experts' choices in any order
    on a GPU. Differentiable."""
    return _SumSlots.apply(y_RD, slots.tokens_EC.flatten(), slots.picks_TK, num_tokens)


def _rows(x_TD: Tensor, tokens_R: Tensor) -> Tensor:
    return F.pad(x_TD, (0, 0, 0, 1)).index_select(0, tokens_R)


def _sums(y_RD: Tensor, tokens_R: Tensor, picks_TK: Tensor | None, num_tokens: int) -> Tensor:
    if picks_TK is not None:
        return sum_picks(F.pad(y_RD, (0, 0, 0, 1)), picks_TK)
    wide = torch.promote_types(y_RD.dtype, torch.float32)
    sums = torch.zeros(num_tokens + 1, y_RD.shape[1], dtype=wide, device=y_RD.device)
    return sums.index_add_(0, tokens_R, y_RD.to(wide))[:-1].to(y_RD.dtype)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(x_TD: Tensor, tokens_R: Tensor, picks_TK: Tensor | None) -> Tensor:
        return _rows(x_TD, tokens_R)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x_TD, tokens_R, picks_TK = inputs
        ctx.save_for_backward(tokens_R, picks_TK)
        ctx.num_tokens = x_TD.shape[0]

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        tokens_R, picks_TK = ctx.saved_tensors
        return _sums(grad_RD, tokens_R, picks_TK, ctx.num_tokens), None, None


class _SumSlots(torch.autograd.Function):
    @staticmethod
    def forward(y_RD: Tensor, tokens_R: Tensor, picks_TK: Tensor | None, num_tokens: int) -> Tensor:
        return _sums(y_RD, tokens_R, picks_TK, num_tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        return _rows(grad_TD, ctx.saved_tensors[0]), None, None, None
