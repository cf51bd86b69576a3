"""How often each value occurs."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config import require


def histogram(x: Tensor, max_val: float) -> Tensor:
    """Counts of the values 0 .. max_val - 1; other values are not counted. The host does not wait for the device.

    Args:
        x: integers [n], or [rows, n] for a histogram of each row.
        max_val: a whole number, the values to count.

    Returns:
        int32 [max_val], or [rows, max_val].

    Raises:
        ConfigError: not integers, another number of dims, or a negative `max_val`.
    """
    require(not x.dtype.is_floating_point and x.dtype != torch.bool, "x.dtype", x.dtype, "an integer dtype")
    require(x.dim() in (1, 2), "x.shape", tuple(x.shape), "[n] or [rows, n]")
    bins = int(max_val)
    require(bins >= 0, "max_val", max_val, "0 or greater")
    values = x.long()
    # Values out of range go to one more bin.
    slots = torch.where((values >= 0) & (values < bins), values, bins)
    counts = torch.zeros(*x.shape[:-1], bins + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(-1, slots, torch.ones_like(slots, dtype=torch.int32))
    return counts[..., :bins].contiguous()
