"""Random values of a parameter from one stream, of which a rank draws only the blocks that its shard touches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.moe.sharded import copy_shard, is_plain, join_runs, local, owned_indices

BLOCK_ELEMENTS = 2**20
"""Of a block, at most, unless one row is longer. The values of larger parameters depend on it: it does not change."""


class Normal(NamedTuple):
    """A normal distribution of mean 0, or what a cut leaves of one."""

    std: float
    """Before the cut; a cut at 3 leaves 0.987 of it."""
    cut: float | None = None
    """Largest size of a value, in units of `std`; None for no limit."""

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which values for a parameter of `dtype` are drawn."""
        # A uniform value of 8 or 11 bits would leave few distinct values, and none in the tails.
        narrow = dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if narrow and self.cut is not None else dtype

    def fill(self, block: Tensor, generator: torch.Generator | None) -> None:
        """Fill `block`; with a cut by inversion, std * sqrt(2) * erfinv(u), u uniform within +-erf(cut / sqrt(2))."""
        if self.cut is None:
            block.normal_(std=self.std, generator=generator)
            return
        bound, limit = math.erf(self.cut / math.sqrt(2)), self.cut * self.std
        block.uniform_(-bound, bound, generator=generator)
        block.erfinv_().mul_(self.std * math.sqrt(2)).clamp_(-limit, limit)


def fill_shard(parameter: Tensor, distribution: Normal, *, name: str, seed: int | None) -> None:
    """Fill a parameter, or this rank's shard of one; the assembled values are the same whatever the layout.

    A row is the last dim. Rows are drawn in blocks of max(1, 2**20 // row length), each from a generator of its own,
    so that beside the shard there is at most one block in memory, and blocks without a row of the shard are not drawn.

    Args:
        name, seed: name the stream. Without a seed the values come from the default generator, in one draw; the ranks
            of a DTensor then draw the whole parameter and must have generators in the same state.
    """
    if seed is None:
        _fill_whole(parameter, distribution)
        return
    part = local(parameter).detach()
    if part.numel() == 0:
        return
    # Rows are addressed as those of a matrix; a shard that is laid out otherwise is filled through a copy.
    shard = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
    _fill_rows(shard, parameter.shape, owned_indices(parameter), distribution, name, seed)
    if shard is not part:
        part.copy_(shard)


def _fill_whole(parameter: Tensor, distribution: Normal) -> None:
    dtype = distribution.dtype(parameter.dtype)
    if is_plain(parameter) and dtype == parameter.dtype:
        distribution.fill(parameter, None)
        return
    whole = torch.empty(parameter.shape, dtype=dtype, device=parameter.device)
    distribution.fill(whole, None)
    if is_plain(parameter):
        parameter.copy_(whole)
    else:
        copy_shard(parameter, whole)


def _fill_rows(
    shard: Tensor, shape: torch.Size, owned: list[list[range]], distribution: Normal, name: str, seed: int
) -> None:
    num_columns = shape[-1] if shape else 1
    num_rows, column_runs = shape.numel() // num_columns, owned[-1] if shape else [range(1)]
    rows_per_block = max(1, BLOCK_ELEMENTS // num_columns)
    dtype = distribution.dtype(shard.dtype)
    shard_RC = shard.view(-1, sum(map(len, column_runs)))
    done = 0
    for index, row_runs in _cut_at_blocks(_row_runs(shape, owned), rows_per_block):
        first = index * rows_per_block
        height, owned_rows = min(rows_per_block, num_rows - first), sum(map(len, row_runs))
        target_RC = shard_RC[done : done + owned_rows]
        done += owned_rows
        if target_RC.shape == (height, num_columns) and dtype == shard.dtype:
            draw_block(target_RC, distribution, name, seed, index)
        else:
            block_RC = torch.empty(height, num_columns, dtype=dtype, device=shard.device)
            draw_block(block_RC, distribution, name, seed, index)
            _copy_boxes(target_RC, block_RC, [range(r.start - first, r.stop - first) for r in row_runs], column_runs)
            del block_RC  # before the next one is there


def draw_block(block_RC: Tensor, distribution: Normal, name: str, seed: int, index: int) -> None:
    """Fill block number `index` of the stream of (seed, name)."""
    stream = f"{seed}:{name}" if index == 0 else f"{seed}:{name}:{index}"
    digest = hashlib.sha256(stream.encode()).digest()
    generator = torch.Generator(block_RC.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    distribution.fill(block_RC, generator)


def _row_runs(shape: torch.Size, owned: list[list[range]]) -> list[range]:
    """The shard's rows, numbered as in the whole parameter seen as a matrix [rows, last dim]."""
    rows = [range(1)]
    for size, runs in zip(shape[:-1], owned[:-1]):
        if runs == [range(size)]:
            rows = [range(r.start * size, r.stop * size) for r in rows]
        else:
            rows = [range(i * size + run.start, i * size + run.stop) for r in rows for i in r for run in runs]
    return join_runs(rows)


def _cut_at_blocks(rows: list[range], rows_per_block: int) -> Iterator[tuple[int, list[range]]]:
    """(number of a block, those of the rows that lie in it), for every block that has any."""
    pieces = (
        range(max(run.start, index * rows_per_block), min(run.stop, (index + 1) * rows_per_block))
        for run in rows
        for index in range(run.start // rows_per_block, (run.stop - 1) // rows_per_block + 1)
    )
    for index, group in groupby(pieces, key=lambda piece: piece.start // rows_per_block):
        yield index, list(group)


def _copy_boxes(target_RC: Tensor, block_RC: Tensor, row_runs: list[range], column_runs: list[range]) -> None:
    """Copy the rows and columns of the runs, side by side in the target. By slices: an index would need a copy more."""
    row = 0
    for rows in row_runs:
        column = 0
        for columns in column_runs:
            box = block_RC[rows.start : rows.stop, columns.start : columns.stop]
            target_RC[row : row + len(rows), column : column + len(columns)].copy_(box)
            column += len(columns)
        row += len(rows)
