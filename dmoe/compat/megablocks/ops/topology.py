"""The blocks of a block-sparse matrix whose rows are grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config import require


def topology(padded_bins: Tensor, block_size: int, output_block_rows: int, output_block_columns: int) -> Tensor:
    """Column, in blocks, of every block stored: the rows of expert e have the blocks e*columns .. (e+1)*columns - 1.

    Args:
        padded_bins: int32 [experts]: where the rows of each expert end, multiples of `block_size`.
        block_size: rows and columns of a block.
        output_block_rows: rows in blocks; those past the last bin get the columns of the last expert.
        output_block_columns: columns in blocks of one expert.

    Returns:
        [output_block_rows * output_block_columns], row by row: int16, or int32 where the last column of the last expert
        is past 32767 (in MegaBlocks it overflows).

    Raises:
        ConfigError: `padded_bins` is no int32 vector, or a size is negative.
    """
    require(padded_bins.dtype == torch.int32, "padded_bins.dtype", padded_bins.dtype, "torch.int32")
    require(padded_bins.dim() == 1, "padded_bins.shape", tuple(padded_bins.shape), "[experts]")
    require(block_size >= 1, "block_size", block_size, "1 or greater")
    require(output_block_rows >= 0, "output_block_rows", output_block_rows, "0 or greater")
    require(output_block_columns >= 0, "output_block_columns", output_block_columns, "0 or greater")
    num_experts, device = padded_bins.numel(), padded_bins.device
    block_rows = torch.arange(output_block_rows, dtype=torch.int32, device=device)
    ends = torch.div(padded_bins, block_size, rounding_mode="floor")
    experts = torch.searchsorted(ends, block_rows, right=True).clamp_(max=max(num_experts - 1, 0))
    columns = torch.arange(output_block_columns, device=device)
    fits = num_experts * output_block_columns - 1 <= torch.iinfo(torch.int16).max
    blocks = experts.unsqueeze(1) * output_block_columns + columns
    return blocks.flatten().to(torch.int16 if fits else torch.int32)
