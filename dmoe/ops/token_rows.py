"""Tokens as rows for ranks: a row for each rank that has experts of the token, however many of its picks are there.

Legend: T tokens, K picks a token, W ranks, R rows, sorted by rank and then by token, D width, C columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.ops.permute import runs_kernels, sort_by_expert, sum_real_picks
from dmoe.ops.platform import on_its_device


class TokenRows(NamedTuple):
    """Which rows there are. Made before it is known how many: a GPU then copies while the host waits for that."""

    inverse_TW: Tensor
    """The row of token t for rank w; where it does not go there, a number greater than that of any row."""
    counts_W2: Tensor
    """int64: rows for each rank, and picks in them."""
    order_R: Tensor | None
    """t * W + w for each row, and anything after the last; None where a GPU's kernels do without."""
    early: tuple[Tensor, Tensor] | None
    """What `rows_to_send` returns, and anything after the last row; None where it is not made early."""


@torch.no_grad()
def token_rows(x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_ranks: int, num_local: int) -> TokenRows:
    """The rows for each rank. No host synchronisation.

    Args:
        x_TD: tokens, in the dtype in which they are sent.
        topk_ids_TK: int32 or int64; rank w has the experts from w * num_local on. A pick of no expert, with the id
            after the last, is on no rank.
        topk_weights_TK: fp32 or fp64.
        num_local: experts of a rank.
    """
    num_tokens = topk_ids_TK.shape[0]
    fits = 0 < num_tokens * max(num_ranks, topk_ids_TK.shape[1]) < 2**31 and topk_weights_TK.dtype == torch.float32
    if fits and x_TD.dtype != torch.float64 and runs_kernels(x_TD):
        return on_its_device(_token_rows_triton)(x_TD, topk_ids_TK, topk_weights_TK, num_ranks, num_local)
    ranks_W = torch.arange(num_ranks, device=x_TD.device)
    here_TKW = (topk_ids_TK // num_local).unsqueeze(2) == ranks_W
    here_TW = here_TKW.any(1)
    # w where the token goes to rank w, else "no rank": so rows are sorted by rank as picks are by expert.
    order_R, inverse_TW, _ = sort_by_expert(torch.where(here_TW, ranks_W, num_ranks), num_ranks)
    counts_W2 = torch.stack([here_TW.sum(0), here_TKW.sum((0, 1))], dim=1)
    return TokenRows(inverse_TW, counts_W2, order_R, None)


def _token_rows_triton(
    x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_ranks: int, num_local: int
) -> TokenRows:
    from dmoe.ops.kernels.rows import spread_rows  # Triton is imported when it is needed
    from dmoe.ops.kernels.token_rows import rows_by_rank

    inverse_TW, picks_RC, counts_W2 = rows_by_rank(topk_ids_TK, topk_weights_TK, num_ranks, num_local)
    x_RD = spread_rows(x_TD.contiguous(), inverse_TW, num_rows=picks_RC.shape[0])
    return TokenRows(inverse_TW, counts_W2, None, (x_RD, picks_RC))


def rows_to_send(
    rows: TokenRows, num_rows: int, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_local: int
) -> tuple[Tensor, Tensor]:
    """The tokens of `num_rows` rows, all that there are, and their picks. Not differentiable.

    Returns:
        x_RD, and picks_RC in the dtype of the weights: those of the token's picks, then for each pick the number of its
        expert on the rank, or `num_local` if it is not there.
    """
    if rows.early is not None:
        x_RD, picks_RC = rows.early
        return x_RD.narrow(0, 0, num_rows), picks_RC.narrow(0, 0, num_rows)
    assert rows.order_R is not None
    num_ranks = rows.inverse_TW.shape[1]
    order_R = rows.order_R.narrow(0, 0, num_rows)
    tokens_R = order_R // num_ranks
    local_RK = topk_ids_TK.index_select(0, tokens_R) - (order_R % num_ranks * num_local).unsqueeze(1)
    local_RK = torch.where((local_RK >= 0) & (local_RK < num_local), local_RK, num_local)
    weights_RK = topk_weights_TK.index_select(0, tokens_R)
    return x_TD.index_select(0, tokens_R), torch.cat([weights_RK, local_RK.to(weights_RK.dtype)], dim=1)


def sum_token_rows(y_RC: Tensor, inverse_TW: Tensor) -> Tensor:
    """[T, C]: the sum of the rows of each token in the order of the ranks, in fp32. Not differentiable."""
    return sum_real_picks(y_RC, inverse_TW)


def spread_token_rows(x_TD: Tensor, inverse_TW: Tensor, order_R: Tensor | None, num_rows: int) -> Tensor:
    """[R, D]: the token of each row: the transpose of `sum_token_rows`. Not differentiable."""
    if order_R is not None:
        return x_TD.index_select(0, order_R.narrow(0, 0, num_rows) // inverse_TW.shape[1])
    from dmoe.ops.kernels.rows import spread_rows

    return on_its_device(spread_rows)(x_TD.contiguous(), inverse_TW, num_rows=num_rows)
