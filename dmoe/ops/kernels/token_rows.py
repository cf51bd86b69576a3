"""Which tokens go to which ranks, in two launches: the rows of each rank, their picks, and how many there are.

The first counts, in blocks of tokens, the tokens and picks for each rank. The second adds the counts of the blocks
before its own up, so that each token knows its row among those for a rank, and writes there what travels beside the
token. Everything is an integer or a copy, so the result is always the same. Nothing is read on the host.

Legend: T tokens, K picks a token, W ranks, B blocks of tokens, R rows over all ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_PICKS = 4096  # of a block, with the filling of K to a power of two
_MAX_TOKENS = 512
_BLOCKS_AT_ONCE = 64

# `do_not_specialize`: the number of tokens changes from call to call and must not compile a kernel again.


@triton.jit
def _block_of_picks(ids_ptr, num_tokens, num_local, TOP_K: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens, picks, a mask of both that ends where they do, the rank of each pick, there -1, and its expert there."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    picks = tl.arange(0, K)
    mask = (tokens < num_tokens)[:, None] & (picks < TOP_K)[None, :]
    ids = tl.load(ids_ptr + tokens.to(tl.int64)[:, None] * TOP_K + picks[None, :], mask=mask, other=0).to(tl.int32)
    return tokens, picks, mask, tl.where(mask, ids // num_local, -1), ids % num_local


@triton.jit(do_not_specialize=["num_tokens"])
def _count_token_rows(
    ids_ptr, counts_ptr, num_tokens, num_local,
    TOP_K: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """counts[b, 0, w] tokens and counts[b, 1, w] picks of block b go to rank w."""
    _, _, _, ranks, _ = _block_of_picks(ids_ptr, num_tokens, num_local, TOP_K, K, BLOCK)
    counts_ptr += tl.program_id(0) * 2 * RANKS
    for rank in range(RANKS):
        picks = tl.sum((ranks == rank).to(tl.int32), 1)
        tl.store(counts_ptr + rank, tl.sum((picks > 0).to(tl.int32), 0))
        tl.store(counts_ptr + RANKS + rank, tl.sum(picks, 0))


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "no_row"])
def _place_token_rows(
    ids_ptr, weights_ptr, counts_ptr, inverse_ptr, picks_ptr, totals_ptr, num_tokens, num_local, num_blocks, no_row,
    TOP_K: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """inverse[t, w]: the row of token t for rank w; at it, the weights of the picks, and their experts there."""
    block = tl.program_id(0)
    all_ranks = tl.arange(0, W)
    totals, before, of_picks = tl.zeros([W], tl.int32), tl.zeros([W], tl.int32), tl.zeros([W], tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        where = counts_ptr + blocks[:, None] * 2 * RANKS + all_ranks[None, :]
        mask = (blocks < num_blocks)[:, None] & (all_ranks < RANKS)[None, :]
        counts = tl.load(where, mask=mask, other=0)
        totals += tl.sum(counts, 0)
        before += tl.sum(tl.where((blocks < block)[:, None], counts, 0), 0)
        if block == 0:
            of_picks += tl.sum(tl.load(where + RANKS, mask=mask, other=0), 0)
    if block == 0:
        tl.store(totals_ptr + 2 * all_ranks, totals.to(tl.int64), mask=all_ranks < RANKS)
        tl.store(totals_ptr + 2 * all_ranks + 1, of_picks.to(tl.int64), mask=all_ranks < RANKS)
    starts = tl.cumsum(totals, 0) - totals + before

    tokens, picks, mask, ranks, local = _block_of_picks(ids_ptr, num_tokens, num_local, TOP_K, K, BLOCK)
    weights = tl.load(weights_ptr + tokens.to(tl.int64)[:, None] * TOP_K + picks[None, :], mask=mask, other=0.0)
    for rank in range(RANKS):
        here = ranks == rank
        goes = tl.max(here.to(tl.int32), 1)
        row = tl.sum(tl.where(all_ranks == rank, starts, 0), 0) + tl.cumsum(goes, 0) - goes
        place = tokens.to(tl.int64) * RANKS + rank
        tl.store(inverse_ptr + place, tl.where(goes > 0, row, no_row), mask=tokens < num_tokens)
        columns = picks_ptr + row.to(tl.int64)[:, None] * (2 * TOP_K) + picks[None, :]
        sent = mask & (goes > 0)[:, None]
        tl.store(columns, weights, mask=sent)
        tl.store(columns + TOP_K, tl.where(here, local, num_local).to(weights.dtype), mask=sent)


def rows_by_rank(
    topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_ranks: int, num_local: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows for each rank: the tokens with picks of its experts, which rank w has from w * num_local on.

    Args:
        topk_ids_TK: int32 or int64, from 0 to num_ranks * num_local, the last of which is of no rank. T and K at
            least 1. A wrong id is not noticed.
        topk_weights_TK: fp32.

    Returns:
        inverse_TW: int32: the row of token t among all rows, which are sorted by rank and then by token; where it
            does not go there, a number greater than that of any row.
        picks_RC: fp32 [T * min(W, K), 2K]: for each row the weights of the token's picks, then the number of each
            pick's expert on that rank, or `num_local` where it is not there. Rows after the last hold anything.
        counts_W2: int64: the rows of each rank, and the picks in them.
    """
    num_tokens, top_k = topk_ids_TK.shape
    ids, weights = topk_ids_TK.contiguous(), topk_weights_TK.contiguous()
    max_rows = num_tokens * min(num_ranks, top_k)
    padded = triton.next_power_of_2(top_k)
    block = max(16, min(_MAX_TOKENS, _PICKS // padded))
    num_blocks = triton.cdiv(num_tokens, block)
    counts = ids.new_empty(num_blocks, 2, num_ranks, dtype=torch.int32)
    inverse_TW = ids.new_empty(num_tokens, num_ranks, dtype=torch.int32)
    picks_RC = weights.new_empty(max_rows, 2 * top_k)
    counts_W2 = ids.new_empty(num_ranks, 2, dtype=torch.int64)
    sizes = {"TOP_K": top_k, "K": padded, "RANKS": num_ranks, "BLOCK": block, "num_warps": 4}
    _count_token_rows[(num_blocks,)](ids, counts, num_tokens, num_local, **sizes)
    _place_token_rows[(num_blocks,)](
        ids, weights, counts, inverse_TW, picks_RC, counts_W2, num_tokens, num_local, num_blocks, max_rows,
        W=triton.next_power_of_2(num_ranks), BLOCKS=_BLOCKS_AT_ONCE, **sizes,
    )  # fmt: skip
    return inverse_TW, picks_RC, counts_W2
