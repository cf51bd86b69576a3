"""Attaching an auxiliary loss to a tensor, so that no list of losses has to leave the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AttachLoss(torch.autograd.Function):
    """Identity on `x`; in the backward, `loss` receives `scale` as its gradient."""

    @staticmethod
    def forward(x: Tensor, loss: Tensor, scale: float) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        _, loss, ctx.scale = inputs
        ctx.save_for_backward(loss)

    @staticmethod
    def backward(ctx: Any, grad_x: Tensor) -> tuple[Tensor, Tensor, None]:
        (loss,) = ctx.saved_tensors
        return grad_x, torch.full_like(loss, ctx.scale), None


def attach_loss(x: Tensor, loss: Tensor, scale: float = 1.0) -> Tensor:
    """Return `x`; whoever backpropagates through it also backpropagates `scale * loss`.

    The loss reaches the parameters although the caller never sees it. Because it is part of the graph, it is counted
    once per backward pass however often the forward is recomputed (activation checkpointing).

    Args:
        x: any tensor on the path to the main loss.
        loss: scalar, already multiplied by its coefficient.
        scale: 1 / number of micro-batches under gradient accumulation.
    """
    return _AttachLoss.apply(x, loss, scale)
