"""Tiling, without a copy where there is nothing to tile."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def repeat(x: Tensor, tiling: Sequence[int]) -> Tensor:
    """`x.repeat(tiling)`; x itself if the tiling is 1 in every dim. Differentiable."""
    return x if all(times == 1 for times in tiling) else x.repeat(*tiling)
