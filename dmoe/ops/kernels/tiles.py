"""The tiles of a grouped product: which expert and which rows each block of rows belongs to.

Every kernel over sorted rows walks the same table, one entry for each block of BLOCK_M rows of one expert. The table
has a size that depends on the shapes alone, and the number of entries in use stays on the device, so that nothing has
to be read back and a graph can be captured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class RowTiles(NamedTuple):
    """Blocks of rows, none across two experts."""

    table_M4: Tensor
    """int32: expert, first row of the block, first row of the expert, end of the expert."""
    used_1: Tensor
    """int32 [1]: entries in use."""
    block_m: int


@triton.jit
def _row_tiles_kernel(
    offsets_ptr, table_ptr, count_ptr, max_tiles, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_ptr + experts, mask=experts < NUM_EXPERTS, other=0)
    starts = tl.load(offsets_ptr + experts - 1, mask=(experts > 0) & (experts < NUM_EXPERTS), other=0)
    last_tiles = tl.cumsum(tl.cdiv(ends - starts, BLOCK_M), axis=0)
    total = tl.max(last_tiles, axis=0)
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    # The expert of a slot: how many experts end at or before it.
    before = last_tiles[None, :] <= slots[:, None]
    expert = tl.sum(before.to(tl.int32), axis=1)
    first_tile = tl.max(tl.where(before, last_tiles[None, :], 0), axis=1)
    used = slots < total
    expert = tl.where(used, expert, 0)
    end = tl.load(offsets_ptr + expert, mask=used, other=0)
    start = tl.load(offsets_ptr + expert - 1, mask=used & (expert > 0), other=0)
    entry = table_ptr + slots * 4
    inside = slots < max_tiles
    tl.store(entry, expert, mask=inside)
    tl.store(entry + 1, start + (slots - first_tile) * BLOCK_M, mask=inside)
    tl.store(entry + 2, start, mask=inside)
    tl.store(entry + 3, end, mask=inside)
    tl.store(count_ptr, total, mask=tl.program_id(0) == 0)


def row_tiles(offsets_E: Tensor, num_rows: int, block_m: int) -> RowTiles:
    """Cut the rows of each expert into blocks of `block_m`.

    Args:
        offsets_E: int32, expert e owns the rows offsets_E[e-1] .. offsets_E[e]-1.
    """
    num_experts = offsets_E.numel()
    # A block for each full one, and for each expert with rows at most one that is not full.
    max_tiles = num_rows // block_m + min(num_rows, num_experts)
    table_M4 = torch.empty(max_tiles, 4, dtype=torch.int32, device=offsets_E.device)
    count = torch.empty(1, dtype=torch.int32, device=offsets_E.device)
    experts = triton.next_power_of_2(num_experts)
    slots = max(1, 8192 // experts)
    _row_tiles_kernel[(max(1, triton.cdiv(max_tiles, slots)),)](
        offsets_E, table_M4, count, max_tiles, num_experts, experts, block_m, slots
    )
    return RowTiles(table_M4, count, block_m)


@triton.jit
def place(tile, count, num_n, GROUP_M: tl.constexpr):
    """(block of rows, block of columns) of a tile: GROUP_M blocks of rows for every block of columns, so that the
    rows and the weights that neighbouring programs read are in the cache."""
    group = tile // (GROUP_M * num_n)
    first = group * GROUP_M
    size = tl.minimum(count - first, GROUP_M)
    within = tile - group * GROUP_M * num_n
    return first + within % size, within // size


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a tile, without moving a value to another thread."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))
