"""Experts that choose tokens.

Legend: T tokens, D width, E experts, C tokens an expert takes, R = E*C rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dmoe.ops import Permutation
from dmoe.ops.permute import gather_rows, sum_rows

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_RD, ids_R1, weights_R1) -> y_RD."""


def compute_chosen(x_TD: Tensor, weights: Tensor, positions: Tensor, experts: Experts) -> tuple[Tensor, Tensor]:
    """Each token's weighted sum over the experts that chose it, which may be none.

    Args:
        weights, positions: [E, C] over all tokens, or [B, E, C] over each of B equal parts of them.

    Returns:
        [T, D], and int32 [E], the tokens that each expert took.
    """
    num_tokens, num_experts = x_TD.shape[0], positions.shape[-2]
    if num_tokens == 0:
        return x_TD.clone(), torch.zeros(num_experts, dtype=torch.int32, device=x_TD.device)
    if positions.dim() == 3:
        starts_B = torch.arange(len(positions), device=positions.device) * (num_tokens // len(positions))
        positions = (positions + starts_B.view(-1, 1, 1)).transpose(0, 1)
        weights = weights.transpose(0, 1)
    tokens_EC, weights_EC = positions.reshape(num_experts, -1), weights.reshape(num_experts, -1)
    num_rows, device = tokens_EC.numel(), x_TD.device
    ids_R = torch.arange(num_experts, device=device).repeat_interleave(tokens_EC.shape[1], output_size=num_rows)

    # Of the T*E pairs of token and expert, the chosen ones are rows; the others are picks of no expert.
    order_R = tokens_EC.flatten() * num_experts + ids_R
    inverse = torch.full((num_tokens * num_experts,), num_rows, device=device)
    inverse[order_R] = torch.arange(num_rows, device=device)
    counts_E = torch.full((num_experts,), tokens_EC.shape[1], dtype=torch.int32, device=device)
    permutation = Permutation(order_R, inverse.view(num_tokens, num_experts), counts_E.cumsum(0, dtype=torch.int32))
    y_RD = experts(gather_rows(x_TD, permutation), ids_R.unsqueeze(1), weights_EC.reshape(-1, 1))
    return sum_rows(y_RD, permutation), counts_E
