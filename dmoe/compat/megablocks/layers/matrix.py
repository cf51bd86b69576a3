"""Elementwise functions of a tensor, or of the values of a block-sparse matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_TOPOLOGY = ("row_indices", "column_indices", "offsets", "column_indices_t", "offsets_t", "block_offsets_t")


def values(x: Any) -> Tensor:
    """The tensor itself, or the stored blocks of an `stk.Matrix`."""
    return x if isinstance(x, Tensor) else x.data


def map_values(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`function` of the values of `x`: a tensor for a tensor, a matrix of the same topology for an `stk.Matrix`.

    A matrix is known by its attributes, so that stk is not imported: any class with the constructor of `stk.Matrix`,
    (size, data, row_indices, ..., block_offsets_t), will do.
    """
    if isinstance(x, Tensor):
        return function(x)
    return type(x)(x.size(), function(x.data), *(getattr(x, name) for name in _TOPOLOGY))
