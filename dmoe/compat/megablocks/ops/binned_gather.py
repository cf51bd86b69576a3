"""Tokens copied into a buffer with the same number of rows for each expert."""

from __future__ import annotations

from torch import Tensor

from dmoe.compat.megablocks.ops.rows import binned_placement, gather_rows


def binned_gather(x: Tensor, indices: Tensor, bins: Tensor, bin_size: int, top_k: int) -> Tensor:
    """`gather` into [experts, bin_size, width]: the rows of an expert past `bin_size` are dropped, rows left are zero.

    Differentiable in x; what was dropped has no gradient.

    Args:
        x, indices, top_k: see `gather`.
        bins: integer [experts]: where the rows of each expert end in the order of `indices`.
        bin_size: the capacity, 0 or more.

    Raises:
        ConfigError: shapes that do not fit, or x of integers.
    """
    out = gather_rows(x, binned_placement(indices, bins, bin_size, top_k))
    return out.view(bins.numel(), bin_size, x.shape[1])
