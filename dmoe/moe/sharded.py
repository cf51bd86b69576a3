"""A rank's part of a parameter. Parameters are plain tensors until `dmoe.parallel` spreads them as DTensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def local(parameter: Any) -> Tensor:
    """This rank's shard of a parameter; a plain tensor is its own shard."""
    return parameter if is_plain(parameter) else parameter.to_local()


def replicated(parameter: Any) -> Tensor:
    """A parameter that ranks hold in full and apply to tokens of their own, so that its gradient is their sum."""
    if is_plain(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    return parameter.to_local(grad_placements=[Partial()] * parameter.device_mesh.ndim)


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is no DTensor."""
    # By type: the compiler answers hasattr(dtensor, "to_local") with no. The import is slow and rarely needed.
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    from torch.distributed.tensor import DTensor

    return not isinstance(tensor, DTensor)


def copy_shard(parameter: Any, whole: Tensor) -> None:
    """Copy this rank's shard of `whole` into a DTensor parameter, without communication."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    # A gate and an up part side by side: two boxes of the whole. Cut to one before the other placements apply.
    placements, mesh = list(parameter.placements), parameter.device_mesh
    for axis, placement in enumerate(placements):
        if getattr(placement, "split_factor", 1) > 1 and placement.dim == 1:
            halves = whole.unflatten(1, (placement.split_factor, -1))
            whole = halves.chunk(mesh.size(axis), dim=2)[mesh.get_local_rank(axis)].flatten(1, 2)
            placements[axis] = Replicate()
    shape, offset = compute_local_shape_and_global_offset(whole.shape, mesh, placements)
    for dim, (start, length) in enumerate(zip(offset, shape)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), length)
    parameter.to_local().copy_(whole)
