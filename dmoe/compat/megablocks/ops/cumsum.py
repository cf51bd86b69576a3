"""Running sums of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config import require


def inclusive_cumsum(x: Tensor, dim: int) -> Tensor:
    """Sums of the elements up to and including each, in the dtype of x.

    Args:
        x: integers [n], whose `dim` is not looked at, or [rows, n].
        dim: 1 for [rows, n].

    Returns:
        the shape of x, but a tensor without dims for [1]: MegaBlocks squeezes, and its callers undo that.

    Raises:
        ConfigError: not integers, another number of dims, or another `dim` of [rows, n].
    """
    require(not x.dtype.is_floating_point and x.dtype != torch.bool, "x.dtype", x.dtype, "an integer dtype")
    require(x.dim() in (1, 2), "x.shape", tuple(x.shape), "[n] or [rows, n]")
    if x.dim() == 1:
        return torch.cumsum(x, 0, dtype=x.dtype).squeeze()
    require(dim == 1, "dim", dim, "1 for [rows, n]")
    return torch.cumsum(x, 1, dtype=x.dtype)


def exclusive_cumsum(x: Tensor, dim: int) -> Tensor:
    """Sums of the elements before each, otherwise as `inclusive_cumsum`."""
    total = inclusive_cumsum(x, dim)
    return total - x.view(total.shape)
