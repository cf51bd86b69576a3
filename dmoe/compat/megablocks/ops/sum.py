"""A sum over a dim, without arithmetic where there is nothing to add."""

from __future__ import annotations

from torch import Tensor


def sum(x: Tensor, dim: int = 0) -> Tensor:
    """`x.sum(dim)`; x without that dim, which is a view of it, if the dim has one element. Differentiable."""
    return x.squeeze(dim) if x.shape[dim] == 1 else x.sum(dim=dim)
