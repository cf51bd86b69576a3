"""Tokens copied into the order of the experts."""

from __future__ import annotations

from torch import Tensor

from dmoe.compat.megablocks.ops.rows import dense_placement, gather_rows


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Row r of the result is token `indices[r] // top_k`. Differentiable in x.

    Args:
        x: [tokens, width], floating point.
        indices: integer [tokens * top_k], a permutation: the picks (token * top_k + k) in the order of the experts.
        bin_ids, bins: not needed; the expert of each row, and where the rows of each expert end.

    Returns:
        [tokens * top_k, width] in the dtype of x; under autocast in that of autocast.

    Raises:
        ConfigError: shapes that do not fit, or x of integers.
    """
    return gather_rows(x, dense_placement(indices, top_k))
