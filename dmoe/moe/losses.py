"""The auxiliary losses of a layer, and how they reach the parameters without a list of losses leaving the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.config import MoEConfig
from dmoe.moe.batch_sums import BatchSums, SequenceSums, probabilities, squared_logsumexp
from dmoe.moe.router import Routing
from dmoe.ops.balancing import sums_by_sequence


def auxiliary_loss(config: MoEConfig, routing: Routing, sums: BatchSums, sequences: SequenceSums | None) -> Tensor:
    """The losses that `config` asks for, times their coefficients, added up: this rank's share.

    The loss of the batch is the sum of the shares of its ranks. All three balancing losses are E * sum_e f_e * P_e (see
    `dmoe.ops.load_balancing_loss`); they differ in the tokens whose load f is: those of the batch, of the optimiser
    step so far ("global", Qiu et al., "Demons in the detail", arXiv:2501.11873), or of each sequence, averaged over
    the sequences (DeepSeek-V3, arXiv:2412.19437, eq. 17-20).
    """
    probs_TE, dtype = probabilities(routing), routing.scores_TE.dtype
    num_tokens = sums.num_tokens.to(dtype)
    loss = (
        config.z_loss_coef * squared_logsumexp(routing) / num_tokens if config.z_loss_coef else probs_TE.new_zeros(())
    )
    if config.aux_loss_coef or config.global_aux_loss_coef:
        factor_E = config.aux_loss_coef * sums.load_E
        if config.global_aux_loss_coef:
            factor_E = factor_E + config.global_aux_loss_coef * sums.step_load_E
        factor_E = (config.num_experts * factor_E).to(dtype)
        loss = loss + weighted_sum(probs_TE.sum(dim=0) / num_tokens, factor_E)
    if sequences is not None:
        picks_B1 = sequences.counts_BE.sum(dim=1, keepdim=True).clamp_min(1)
        tokens_B1 = sequences.tokens_B.unsqueeze(1).clamp_min(1)
        factor_BE = sequences.counts_BE / (picks_B1 * tokens_B1 * sums.num_sequences)
        factor_BE = (config.seq_aux_loss_coef * config.num_experts * factor_BE).to(dtype)
        loss = loss + (sums_by_sequence(probs_TE, len(factor_BE)) * factor_BE).sum()
    return loss


class _WeightedSum(torch.autograd.Function):
    """sum_e values_e * factors_e, without a gradient for the factors."""

    @staticmethod
    def forward(values_E: Tensor, factors_E: Tensor) -> Tensor:
        return (values_E * factors_E).sum()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        # Not saved for the backward: activation checkpointing would put the factors of the recomputed forward in their
        # place, and in a pipeline other micro-batches of the step have been counted by then.
        ctx.factors_E = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factors_E, None


def weighted_sum(values_E: Tensor, factors_E: Tensor) -> Tensor:
    """sum_e values_e * factors_e, where the factors are those of the first forward even if it is recomputed."""
    if torch.compiler.is_compiling():
        return (values_E * factors_E).sum()
    return _WeightedSum.apply(values_E, factors_E)


class _AttachLoss(torch.autograd.Function):
    """Identity on `x`; in the backward, `loss` receives `scale` as its gradient."""

    @staticmethod
    def forward(x: Tensor, loss: Tensor, scale: float) -> Tensor:
        # Of a graph's input the compiler would make the view again outside the graph, without this function's backward.
        return x.clone() if torch.compiler.is_compiling() else x.view_as(x)

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
