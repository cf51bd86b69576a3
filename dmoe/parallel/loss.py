"""Cross entropy of logits whose vocabulary is split over ranks (Shoeybi et al., arXiv:1909.08053, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dmoe.parallel.mesh import ParallelMesh

IGNORED = -1
"""Targets with this value cost nothing."""


LossFunction = Callable[[Tensor, Tensor], Tensor]
"""(logits [..., V], targets [...]) -> cross entropy in nats, summed over the targets that are not `IGNORED`."""


def loss_function(vocab_size: int, mesh: ParallelMesh | None = None) -> LossFunction:
    """The loss for what a part that is last puts out: logits of the whole vocabulary, or this rank's part of it.

    Computed in fp32 (fp64 for fp64 logits). Ranks of one "tp" axis get the same result.
    """
    if mesh is None or mesh.config.tp == 1 or not mesh.config.loss_parallel:
        return _whole_cross_entropy
    axis = mesh.dense["tp"]
    first = axis.get_local_rank() * -(-vocab_size // axis.size())
    return partial(_split_cross_entropy, first=first, group=axis.get_group())


def _whole_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    logits_TV, targets_T = _flat(logits, targets)
    return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")


def _split_cross_entropy(logits: Tensor, targets: Tensor, *, first: int, group: dist.ProcessGroup) -> Tensor:
    return _SplitCrossEntropy.apply(*_flat(logits, targets), first, group)


def _flat(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide.flatten(0, -2), targets.flatten()


class _SplitCrossEntropy(torch.autograd.Function):
    """The softmax of the local part is all that is kept."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, first: int, group: dist.ProcessGroup) -> Tensor:
        largest_T = logits_TV.amax(dim=1)
        dist.all_reduce(largest_T, dist.ReduceOp.MAX, group)
        exp_TV = (logits_TV - largest_T.unsqueeze(1)).exp()
        ids_T = targets_T - first
        mine_T = (ids_T >= 0) & (ids_T < logits_TV.shape[1])
        ids_T = ids_T.clamp(0, logits_TV.shape[1] - 1)
        target_logits_T = torch.where(mine_T, logits_TV.gather(1, ids_T.unsqueeze(1)).squeeze(1) - largest_T, 0)
        sums = torch.stack([exp_TV.sum(dim=1), target_logits_T])
        dist.all_reduce(sums, group=group)
        counted_T = targets_T != IGNORED
        ctx.save_for_backward(exp_TV.div_(sums[0].unsqueeze(1)), ids_T, mine_T, counted_T)
        return torch.where(counted_T, sums[0].log() - sums[1], 0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        softmax_TV, ids_T, mine_T, counted_T = ctx.saved_tensors
        grad_TV = softmax_TV.clone()
        grad_TV.scatter_add_(1, ids_T.unsqueeze(1), -mine_T.to(grad_TV.dtype).unsqueeze(1))
        return grad_TV.mul_((grad * counted_T).unsqueeze(1)), None, None, None
