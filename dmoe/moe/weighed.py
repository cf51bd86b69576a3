"""Routing weights on what experts read (`MoEConfig.weigh_input`), in place of what they return.

A pick is then a row of its own, the token times the weight, and goes to its expert with the weight 1; so every
dispatcher and backend computes it as it computes any other row. The gradient of the weight comes through the product.

Legend: T tokens, K picks a token, R = T * K rows, in the order of the tokens and then of the picks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.router import Routing
from dmoe.ops.permute import Permutation, sum_rows


def weigh(x: Tensor, weights: Tensor) -> Tensor:
    """Their product, in fp32 or wider, in the dtype of `x`."""
    return (x * weights).to(x.dtype)


def weighed_rows(x_TD: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
    """[R, D]: for each pick the token times its weight; and where the rows go. Rows of no expert keep the id E."""
    weights_TK = routing.topk_weights_TK
    rows_TKD = weigh(x_TD.unsqueeze(1), weights_TK.unsqueeze(2))
    ones_R1 = torch.ones_like(weights_TK).view(-1, 1)
    of_rows = routing._replace(topk_ids_TK=routing.topk_ids_TK.reshape(-1, 1), topk_weights_TK=ones_R1)
    return rows_TKD.flatten(0, 1), of_rows


def sum_picks_of_tokens(y_RD: Tensor, topk_ids_TK: Tensor) -> Tensor:
    """[T, D]: the sum of the rows of each token, in the order of its picks, in fp32. Differentiable."""
    rows_TK = torch.arange(y_RD.shape[0], device=y_RD.device).view(topk_ids_TK.shape)
    return sum_rows(y_RD, Permutation(rows_TK.flatten(), rows_TK, rows_TK))
