"""Stable sort of integers."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config import require


def sort(x: Tensor, end_bit: int | None = None) -> tuple[Tensor, Tensor]:
    """(values, indices): `x` sorted, equal values in their order, and where each value came from.

    Args:
        x: [n] int16, int32 or int64.
        end_bit: compare only the bits below this one, as unsigned numbers; None compares all, with the sign.

    Returns:
        values in the dtype of x. Indices too, but int32 for an int16 `x` of more than 32768 elements, whose indices
        int16 does not hold (in MegaBlocks they overflow).

    Raises:
        ConfigError: another dtype or number of dims, or a negative `end_bit`.
    """
    require(x.dtype in (torch.int16, torch.int32, torch.int64), "x.dtype", x.dtype, "int16, int32 or int64")
    require(x.dim() == 1, "x.shape", tuple(x.shape), "[n]")
    require(end_bit is None or end_bit >= 0, "end_bit", end_bit, "None, or 0 or greater")
    fits = x.numel() - 1 <= torch.iinfo(x.dtype).max
    index_dtype = x.dtype if fits else torch.int32
    if end_bit is None or end_bit >= 8 * x.element_size():
        values, order = torch.sort(x, stable=True)
    else:
        order = torch.sort(x & (2**end_bit - 1), stable=True).indices
        values = x[order]
    return values, order.to(index_dtype)
