"""Tokens copied into the order of the experts, with room after those of each expert."""

from __future__ import annotations

from torch import Tensor

from dmoe.compat.megablocks.ops.rows import gather_rows, padded_placement
from dmoe.config import require


def padded_rows(padded_bins: Tensor) -> int:
    """Rows of the padded buffer, read from the device: the host waits for it."""
    require(padded_bins.numel() > 0, "padded_bins.shape", tuple(padded_bins.shape), "[experts], at least 1")
    return int(padded_bins[-1])


def padded_gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor, top_k: int) -> Tensor:
    """`gather` into a buffer in which the rows of expert e begin at `padded_bins[e - 1]`. Differentiable in x.

    The number of rows depends on the data, so the host waits for the device once.

    Args:
        x, indices, top_k: see `gather`.
        bin_ids: integer [tokens * top_k], the expert of each index, rising.
        bins, padded_bins: integer [experts]: where the rows of each expert end, without and with padding.

    Returns:
        [padded_bins[-1], width]; rows of padding are zero.

    Raises:
        ConfigError: shapes that do not fit, or x of integers.
    """
    placement = padded_placement(indices, bin_ids, bins, padded_bins, top_k, padded_rows(padded_bins))
    return gather_rows(x, placement)
