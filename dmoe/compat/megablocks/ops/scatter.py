"""Rows in the order of the experts added up for each token."""

from __future__ import annotations

from torch import Tensor

from dmoe.compat.megablocks.ops.rows import dense_placement, scatter_rows


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """Sum of each token's `top_k` rows, each times its weight. Differentiable in x and weights.

    A product is made in fp32 and rounded to the dtype of x; the rounded products are added (in fp32 inside, rounded
    once). The gradient of a weight is a dot product in fp32, rounded to the dtype of x.

    Args:
        x: [tokens * top_k, width], floating point: row r belongs to pick `indices[r]`, of token `indices[r] // top_k`.
        indices: integer [tokens * top_k], a permutation.
        bin_ids, bins: not needed; see `gather`.
        weights: [tokens * top_k] in the order of the picks, or None for 1.

    Returns:
        [tokens, width] in the dtype of x; under autocast in that of autocast.

    Raises:
        ConfigError: shapes that do not fit, or x of integers.
    """
    return scatter_rows(x, weights, dense_placement(indices, top_k))
