"""`megablocks.backend.kernels`: moving rows, with weights on the way in or out, and the gradient of the weights.

The functions of `megablocks.ops` without their autograd and without autocast. Arguments and shapes as there; `weights`
([tokens * top_k] or None) multiply rows in fp32 and the products are rounded to the dtype of the rows.
"""

from __future__ import annotations

from torch import Tensor

from dmoe.compat.megablocks.ops.padded_gather import padded_rows
from dmoe.compat.megablocks.ops.rows import (
    add_rows,
    binned_placement,
    copy_rows,
    dense_placement,
    padded_placement,
    weight_gradient,
)


def gather(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int
) -> Tensor:  # fmt: skip
    """See `megablocks.ops.gather`; each copy is multiplied by the weight of its pick."""
    return copy_rows(x, weights, dense_placement(indices, top_k))


def scatter(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int
) -> Tensor:  # fmt: skip
    """See `megablocks.ops.scatter`."""
    return add_rows(x, weights, dense_placement(indices, top_k))


def scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Gradient of the weights of `scatter`: [tokens * top_k] in the dtype of x."""
    return weight_gradient(x, grad, dense_placement(indices, top_k))


def padded_gather(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:  # fmt: skip
    """See `megablocks.ops.padded_gather`; each copy is multiplied by the weight of its pick."""
    placement = padded_placement(indices, bin_ids, bins, padded_bins, top_k, padded_rows(padded_bins))
    return copy_rows(x, weights, placement)


def padded_scatter(
    x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:  # fmt: skip
    """See `megablocks.ops.padded_scatter`."""
    return add_rows(x, weights, padded_placement(indices, bin_ids, bins, padded_bins, top_k, x.shape[0]))


def padded_scatter_wgrad(
    x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, padded_bins: Tensor, top_k: int
) -> Tensor:  # fmt: skip
    """Gradient of the weights of `padded_scatter`: [tokens * top_k] in the dtype of x."""
    return weight_gradient(x, grad, padded_placement(indices, bin_ids, bins, padded_bins, top_k, x.shape[0]))


def binned_gather(
    x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, expert_capacity: int, top_k: int
) -> Tensor:  # fmt: skip
    """See `megablocks.ops.binned_gather`; each copy is multiplied by the weight of its pick."""
    out = copy_rows(x, weights, binned_placement(indices, bins, expert_capacity, top_k))
    return out.view(bins.numel(), expert_capacity, x.shape[1])


def binned_scatter(x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """See `megablocks.ops.binned_scatter`."""
    return add_rows(x.flatten(0, 1), weights, binned_placement(indices, bins, x.shape[1], top_k))


def binned_scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Gradient of the weights of `binned_scatter`: [tokens * top_k] in the dtype of x, 0 for what was dropped."""
    return weight_gradient(x.flatten(0, 1), grad, binned_placement(indices, bins, x.shape[1], top_k))
