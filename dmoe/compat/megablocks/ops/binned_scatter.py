"""Rows of a buffer with the same number of rows for each expert added up for each token."""

from __future__ import annotations

from torch import Tensor

from dmoe.compat.megablocks.ops.rows import binned_placement, scatter_rows
from dmoe.config import require


def binned_scatter(x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """`scatter` from a buffer laid out as by `binned_gather`: [experts, capacity, width] to [tokens, width].

    A pick that was dropped adds nothing, and its weight has the gradient 0. Differentiable in x and weights, rounded as
    in `scatter`.

    Raises:
        ConfigError: shapes that do not fit, or x of integers.
    """
    if x.dim() != 3 or x.shape[0] != bins.numel():
        require(False, "x.shape", tuple(x.shape), f"[{bins.numel()}, capacity, width], a group for each of the bins")
    return scatter_rows(x.flatten(0, 1), weights, binned_placement(indices, bins, x.shape[1], top_k))
