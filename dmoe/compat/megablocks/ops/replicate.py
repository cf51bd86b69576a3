"""One value for each bin copied to all places of the bin."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.config import require


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bins: Tensor, num_outputs: int) -> Tensor:
        ctx.save_for_backward(bins)
        places = torch.arange(num_outputs, device=x.device)
        # Places past the last bin take the column of zeros.
        return F.pad(x, (0, 1)).index_select(1, torch.searchsorted(bins.long(), places, right=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (bins,) = ctx.saved_tensors
        lengths = torch.diff(bins.long().clamp(max=grad.shape[1]), prepend=bins.new_zeros(1, dtype=torch.int64))
        wide = grad if grad.dtype == torch.float64 else grad.float()
        # Without a look at the lengths, for which the host would wait.
        sums = torch.segment_reduce(wide.t().contiguous(), "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)
        return sums.t().to(grad.dtype), None, None


def replicate(x: Tensor, bins: Tensor, num_outputs: int | Tensor) -> Tensor:
    """out[b, j] = x[b, e] for bins[e - 1] <= j < bins[e]; 0 past the last bin.

    Args:
        x: [rows, bins] of any dtype (MegaBlocks: float16, int16, int32).
        bins: integer [bins]: where each bin ends, rising.
        num_outputs: columns of the result; a tensor is read by the host.

    Returns:
        [rows, num_outputs] in the dtype of x. Differentiable in x: the gradient is the sum over each bin, in fp32.

    Raises:
        ConfigError: shapes that do not fit, or a negative `num_outputs`.
    """
    require(x.dim() == 2, "x.shape", tuple(x.shape), "[rows, bins]")
    require(bins.shape == x.shape[1:], "bins.shape", tuple(bins.shape), f"{tuple(x.shape[1:])}, as x has columns")
    require(int(num_outputs) >= 0, "num_outputs", int(num_outputs), "0 or greater")
    return _Replicate.apply(x, bins, int(num_outputs))
