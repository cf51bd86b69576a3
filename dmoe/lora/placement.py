"""How an adapter's factors lie over the ranks, and what of them a rank computes with.

An adapter follows its base weight: expert parallelism cuts the factors of experts by expert, and tensor parallelism
cuts the one factor that has the cut width. Over the data axes the factors of experts, which are many, are cut as well
and gathered at each forward; the others are copies, whose gradients are summed once a step. FSDP has no part in it: a
unit of FSDP has the parameters that it had when it was made, and adapters come later.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import require
from dmoe.moe.sharded import is_plain
from dmoe.parallel import ParallelMesh


def split_axis(weight: Any, name: str) -> tuple[str, int]:
    """Which axis cuts a base weight within a model's copy, and which dim it cuts: ("", -1) if none does."""
    if is_plain(weight):
        return "", -1
    for axis, placement in zip(weight.device_mesh.mesh_dim_names, weight.placements):
        if axis in ("tp", "ep") and not placement.is_replicate():
            require(hasattr(placement, "dim"), name, placement, "cut along a dim, for adapters")
            return axis, placement.dim
    return "", -1


def new_factor(
    shape: tuple[int, ...], like: Tensor, mesh: ParallelMesh | None, *, split: int | None = None,
    data: int | None = None, ep: bool = False,
) -> nn.Parameter:  # fmt: skip
    """An uninitialised factor of this whole shape, with dtype and device of the base weight `like`.

    Args:
        split: dim that "tp" cuts, or "ep" if `ep` is set.
        data: dim that the sharded data axis cuts. None: a copy on each rank.
    """
    if mesh is None:
        return nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import empty as empty_dtensor

    if data is None and split is None:
        axes = mesh.batch["batch"]  # all ranks of a stage as one axis, so that a gradient is summed at once
        return nn.Parameter(empty_dtensor(shape, dtype=like.dtype, device_mesh=axes, placements=[Replicate()]))
    replicas = ("dp_replicate",) if mesh.config.dp_replicate > 1 else ()
    names = (*replicas, "efsdp", "ep") if ep else (*replicas, "fsdp", "tp")
    axes = (mesh.experts if ep else mesh.dense)[names]
    placements = [Replicate() if dim is None else Shard(dim) for dim in (data, split)]
    placements = [*(Replicate() for _ in replicas), *placements]
    return nn.Parameter(empty_dtensor(shape, dtype=like.dtype, device_mesh=axes, placements=placements))


def computed_part(factor: Any) -> Tensor:
    """What of a factor this rank computes with: all, or the part that tensor or expert parallelism leaves it.

    Ranks of the other axes apply it to tokens of their own, or use its results in part, so its gradient is their sum.
    """
    if is_plain(factor):
        return factor
    from torch.distributed.tensor import Partial, Replicate

    data, split = factor.placements[:-1], factor.placements[-1]
    if not all(placement.is_replicate() for placement in data):
        factor = factor.redistribute(placements=[*(Replicate() for _ in data), split])
    partial = [*(Partial() for _ in data), Partial() if split.is_replicate() else split]
    return factor.to_local(grad_placements=partial)
