"""Rows of a buffer with padding added up for each token."""

from __future__ import annotations

from torch import Tensor

from dmoe.compat.megablocks.ops.rows import padded_placement, scatter_rows


def padded_scatter(
    x: Tensor,
    indices: Tensor,
    bin_ids: Tensor,
    weights: Tensor | None,
    bins: Tensor,
    padded_bins: Tensor,
    top_k: int,
) -> Tensor:
    """`scatter` from a buffer laid out as by `padded_gather`: [padded rows, width] to [tokens, width].

    Rows of padding are not read, and their gradient is zero. The host does not wait for the device. Differentiable in x
    and weights, rounded as in `scatter`.

    Raises:
        ConfigError: shapes that do not fit, or x of integers.
    """
    return scatter_rows(x, weights, padded_placement(indices, bin_ids, bins, padded_bins, top_k, x.shape[0]))
