"""Rounding up to a multiple."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config import require


def round_up(x: Tensor, value: int) -> Tensor:
    """The least multiple of `value` that is not below each element of x, int32 of 0 and more.

    Raises:
        ConfigError: another dtype, or a `value` below 1.
    """
    require(x.dtype == torch.int32, "x.dtype", x.dtype, "torch.int32")
    require(value >= 1, "value", value, "1 or greater")
    return torch.div(x + (value - 1), value, rounding_mode="trunc") * value
