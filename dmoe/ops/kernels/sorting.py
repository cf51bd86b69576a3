"""Picks grouped by expert: a stable counting sort, in one launch for few rows and in three for many.

The keys are the E experts, so no general sort is needed: count each expert's rows in every block of rows, add the
counts up over blocks and over experts, and each row knows where it goes once it knows its rank in its own block. That
rank comes from sorting the block by (expert, row) in registers. Everything is an integer and nothing depends on the
order in which programs run, so the result is always the same. Nothing is read on the host.

Legend: T tokens, K picks, R = T*K rows, E experts, B blocks of rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe.ops.permute import Permutation

# Rows that a program sorts in registers. Larger blocks mean fewer counters and longer runs written to memory, and
# log2(block)^2 / 2 steps of the sort.
_BLOCK = 1024
_BLOCKS_AT_ONCE = 128
_EXPERTS_AT_ONCE = 16

# `do_not_specialize`: the number of rows changes from call to call and must not compile a kernel again.


@triton.jit
def _load_ids(ids_ptr, rows, num_rows, num_experts):
    """Expert ids; num_experts, the id of no expert, beyond the last row too."""
    return tl.load(ids_ptr + rows, mask=rows < num_rows, other=num_experts).to(tl.int32)


@triton.jit
def _sort_block(ids, valid, BLOCK: tl.constexpr, E_PAD: tl.constexpr):
    """(expert, index in the block) of a block's rows in the order of both; what is not valid comes last, as E_PAD."""
    key = tl.where(valid, ids, E_PAD) * BLOCK + tl.arange(0, BLOCK)
    key = tl.sort(key)
    return key // BLOCK, key % BLOCK


@triton.jit(do_not_specialize=["num_rows"])
def _sort_in_one_block(
    ids_ptr, order_ptr, inverse_ptr, offsets_ptr, num_rows, num_experts, BLOCK: tl.constexpr, E_PAD: tl.constexpr
):
    slots = tl.arange(0, BLOCK)
    experts = tl.arange(0, E_PAD)
    ids = _load_ids(ids_ptr, slots, num_rows, num_experts)
    valid = ids < num_experts
    ends = tl.cumsum(tl.histogram(ids, E_PAD, mask=valid), 0)
    tl.store(offsets_ptr + experts, ends, mask=experts < num_experts)
    expert, rows = _sort_block(ids, valid, BLOCK, E_PAD)
    tl.store(order_ptr + slots, rows, mask=slots < num_rows)
    tl.store(inverse_ptr + rows, tl.where(expert < E_PAD, slots, num_rows), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _count_blocks(ids_ptr, counts_ptr, num_rows, num_experts, BLOCK: tl.constexpr, E_PAD: tl.constexpr):
    """counts[b, e]: rows of block b that go to expert e."""
    block = tl.program_id(0)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    ids = _load_ids(ids_ptr, rows, num_rows, num_experts)
    counts = tl.histogram(ids, E_PAD, mask=ids < num_experts)
    tl.store(counts_ptr + block * E_PAD + tl.arange(0, E_PAD), counts)


@triton.jit(do_not_specialize=["num_blocks"])
def _add_up_blocks(
    counts_ptr, before_ptr, num_blocks, E_PAD: tl.constexpr, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr
):
    """before[b, e]: rows of expert e in the blocks before b. before[num_blocks, e]: all rows of expert e."""
    experts = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    running = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, num_blocks, BLOCKS):
        blocks = start + tl.arange(0, BLOCKS)
        where = blocks[:, None] * E_PAD + experts[None, :]
        mask = (blocks < num_blocks)[:, None]
        counts = tl.load(counts_ptr + where, mask=mask, other=0)
        tl.store(before_ptr + where, running[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        running += tl.sum(counts, 0)
    tl.store(before_ptr + num_blocks * E_PAD + experts, running)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _place_rows(
    ids_ptr, counts_ptr, before_ptr, order_ptr, inverse_ptr, offsets_ptr, num_rows, num_experts, num_blocks,
    BLOCK: tl.constexpr, E_PAD: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slots = tl.arange(0, BLOCK)
    experts = tl.arange(0, E_PAD)
    ids = _load_ids(ids_ptr, block * BLOCK + slots, num_rows, num_experts)

    totals = tl.load(before_ptr + num_blocks * E_PAD + experts)
    ends = tl.cumsum(totals, 0)
    if block == 0:
        tl.store(offsets_ptr + experts, ends, mask=experts < num_experts)
    counts = tl.load(counts_ptr + block * E_PAD + experts)
    start_in_block = tl.cumsum(counts, 0) - counts
    # The row in slot s of the sorted block is number s - start_in_block of its expert's rows in this block.
    shift = ends - totals + tl.load(before_ptr + block * E_PAD + experts) - start_in_block

    expert, index = _sort_block(ids, ids < num_experts, BLOCK, E_PAD)
    place = slots + tl.gather(shift, tl.minimum(expert, E_PAD - 1), 0)
    row = block * BLOCK + index
    kept = expert < E_PAD
    tl.store(order_ptr + place, row, mask=kept)
    tl.store(inverse_ptr + row, tl.where(kept, place, num_rows), mask=row < num_rows)
    # What follows the rows of the experts is read by no product, but must name a pick.
    here = block * BLOCK + slots
    tl.store(order_ptr + here, tl.zeros([BLOCK], tl.int32), mask=(here >= tl.sum(totals, 0)) & (here < num_rows))


def counting_sort(topk_ids_TK: Tensor, num_experts: int, *, block: int = _BLOCK) -> Permutation:
    """`dmoe.ops.sort_by_expert` in int32, for use inside an operator.

    Args:
        topk_ids_TK: int32 or int64 expert ids in [0, num_experts], T * K < 2**31. A negative id is not noticed and
            makes rows be written anywhere.
        block: rows that one program sorts, a power of two. No more rows than that take one launch.
    """
    num_rows = topk_ids_TK.numel()
    ids_R = topk_ids_TK.contiguous()
    order_R = ids_R.new_empty(num_rows, dtype=torch.int32)
    inverse_TK = ids_R.new_empty(topk_ids_TK.shape, dtype=torch.int32)
    if num_rows == 0:
        return Permutation(order_R, inverse_TK, ids_R.new_zeros(num_experts, dtype=torch.int32))
    offsets_E = ids_R.new_empty(num_experts, dtype=torch.int32)
    padded = max(_EXPERTS_AT_ONCE, triton.next_power_of_2(num_experts))
    if num_rows <= block:
        block = max(32, triton.next_power_of_2(num_rows))
        _sort_in_one_block[(1,)](
            ids_R,
            order_R,
            inverse_TK,
            offsets_E,
            num_rows,
            num_experts,
            BLOCK=block,
            E_PAD=padded,
            num_warps=_warps(block),
        )
        return Permutation(order_R, inverse_TK, offsets_E)

    num_blocks = triton.cdiv(num_rows, block)
    counts_BE = ids_R.new_empty(num_blocks, padded, dtype=torch.int32)
    before_BE = ids_R.new_empty(num_blocks + 1, padded, dtype=torch.int32)
    sizes = {"BLOCK": block, "E_PAD": padded}
    _count_blocks[(num_blocks,)](ids_R, counts_BE, num_rows, num_experts, **sizes, num_warps=4)
    _add_up_blocks[(padded // _EXPERTS_AT_ONCE,)](
        counts_BE, before_BE, num_blocks, E_PAD=padded, BLOCKS=_BLOCKS_AT_ONCE, EXPERTS=_EXPERTS_AT_ONCE, num_warps=4
    )
    _place_rows[(num_blocks,)](
        ids_R, counts_BE, before_BE, order_R, inverse_TK, offsets_E, num_rows, num_experts, num_blocks,
        **sizes, num_warps=_warps(block),
    )  # fmt: skip
    return Permutation(order_R, inverse_TK, offsets_E)


def _warps(block: int) -> int:
    return min(8, max(1, block // 128))
