"""The load-balancing loss, and the fork's z-loss, from what the layers saved.

Legend: L layers of this pipeline stage, T tokens, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.config import require


def _layers_of_stage(args: Arguments) -> int:
    if args.num_layers_per_virtual_pipeline_stage is not None:
        return args.num_layers_per_virtual_pipeline_stage
    return args.num_layers // args.pipeline_model_parallel_size


def _check(saved: Sequence[tuple[Tensor, ...]], args: Arguments) -> None:
    layers = _layers_of_stage(args)
    require(
        len(saved) == layers, "number of saved load-balancing losses", len(saved),
        f"{layers}, one of each layer (num_layers {args.num_layers}, pipeline_model_parallel_size "
        f"{args.pipeline_model_parallel_size}, num_layers_per_virtual_pipeline_stage "
        f"{args.num_layers_per_virtual_pipeline_stage}): run every layer once in training mode after "
        "clear_load_balancing_loss",
    )  # fmt: skip
    experts, tokens = args.moe_num_experts, saved[0][1].shape[0]
    for counts, scores, *_ in saved:
        require(counts.shape == (experts,), "shape of tokens_per_expert", tuple(counts.shape), f"[{experts}]")
        require(scores.shape == (tokens, experts), "shape of scores", tuple(scores.shape), f"[{tokens}, {experts}]")


def balancing_loss(saved: Sequence[tuple[Tensor, ...]], args: Arguments) -> Tensor | float:
    """See `moe.batched_load_balancing_loss`."""
    _check(saved, args)
    if args.moe_loss_weight == 0:
        return 0.0
    if torch.is_grad_enabled() and not any(scores.requires_grad for _, scores, *_ in saved):
        warnings.warn(
            "the saved scores have no gradient, so the load-balancing loss trains nothing: the router is frozen, or "
            "the layers ran under reentrant activation checkpointing (use_reentrant=False keeps the gradient)",
            stacklevel=3,
        )
    scores = torch.cat([entry[1] for entry in saved], dim=1)
    if args.moe_lbl_in_fp32:
        scores = scores.float()
    tokens = max(1, scores.shape[0])
    scores_LE = scores.mean(dim=0) if scores.shape[0] else scores.sum(dim=0)
    counts_LE = torch.cat([entry[0] for entry in saved]).to(scores.dtype)
    scale = args.moe_num_experts * args.moe_loss_weight / (args.num_layers * tokens * args.moe_top_k)
    return scale * torch.dot(counts_LE, scores_LE)


def paired_zloss(saved: Sequence[tuple[Tensor, ...]], args: Arguments) -> Tensor:
    """moe_zloss_weight * sum over layers and tokens of logsumexp(logits)^2 / (num_layers * T * top_k), a scalar.

    So in the fork: the mean of ST-MoE (arXiv:2202.08906, eq. 5) divided by top_k as well.
    """
    _check(saved, args)
    logits = torch.cat([entry[2] for entry in saved])
    if args.moe_zloss_in_fp32:
        logits = logits.float()
    tokens = max(1, saved[0][1].shape[0])
    squares = logits.logsumexp(dim=-1).square().sum()
    return args.moe_zloss_weight * squares / (args.num_layers * tokens * args.moe_top_k)
