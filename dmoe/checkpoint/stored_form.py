"""The form in which a tensor is written: whatever the layout, a rank's part is one box of the global tensor.

DCP describes a rank's part of a tensor by one offset and one size. When tensor parallelism splits the width of gated
experts, a rank holds some gate rows and the up rows that belong to them: two boxes of `gate_up_proj` [E, 2F, D]. Seen
as [E, 2, F, D] they are one. So that any layout can read what any other wrote, this is the form in the file for all.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dmoe.errors import ConfigError

# Number of dims as a parameter; dim 1 has the gate rows, then the up rows.
_GATE_UP_DIMS = {"gate_up_proj": 3, "gate_up_bias": 2}


def stored_form(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of this dotted name as it is in a checkpoint file: itself, or a view on the same storage.

    Any tensor called `gate_up_proj` [E, 2F, D] or `gate_up_bias` [E, 2F], and the optimiser's tensors of that shape
    right below such a name, become [E, 2, F, D] and [E, 2, F]. Raises ConfigError for a DTensor whose part on this
    rank is not one box of the global tensor in that form.
    """
    gate_up = any(_GATE_UP_DIMS.get(part) == tensor.ndim for part in name.split(".")[-2:])
    if not _is_dtensor(tensor):
        return _split_rows(name, tensor.detach()) if gate_up else tensor
    if gate_up:
        tensor = _split_dtensor_rows(name, tensor)
    _require_one_box(name, tensor)
    return tensor


def _split_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.shape[1]
    if rows % 2:
        raise ConfigError(f"{name} has {rows} rows an expert: must be as many gate rows as up rows")
    return tensor.unflatten(1, (2, rows // 2))


def _split_dtensor_rows(name: str, tensor: Any) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Shard

    placements = []
    for placement in tensor.placements:
        dim, factor = getattr(placement, "dim", 0), getattr(placement, "split_factor", 1)
        if dim == 0:
            placements.append(placement)
        elif dim == 1 and factor == 2:
            placements.append(Shard(2))
        elif dim > 1 and factor == 1:
            placements.append(Shard(dim + 1))
        else:
            raise _bad_layout(name, tensor, "dim 1 split by _StridedShard(1, split_factor=2) or not at all")
    whole = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
    whole = _split_rows(name, whole)
    local = _split_rows(name, tensor.detach().to_local())
    return DTensor.from_local(
        local, tensor.device_mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _require_one_box(name: str, tensor: Any) -> None:
    for index, placement in enumerate(tensor.placements):
        factor = getattr(placement, "split_factor", 1)
        if factor == 1:
            continue
        # A strided shard is a box only together with the later axes that split the same dim into that many parts.
        later = [
            tensor.device_mesh.size(axis)
            for axis in range(index + 1, tensor.device_mesh.ndim)
            if getattr(tensor.placements[axis], "dim", None) == placement.dim
        ]
        if math.prod(later) != factor:
            raise _bad_layout(name, tensor, "a layout in which each rank has one box")
    (box,) = tensor.__create_chunk_list__()
    local = tensor.to_local().shape
    # An empty part has no place. Otherwise torch's arithmetic for uneven strided shards can miss the real split.
    if box.sizes != local and (math.prod(box.sizes) or local.numel()):
        raise _bad_layout(name, tensor, "a size that the ranks divide evenly")


def _bad_layout(name: str, tensor: Any, wanted: str) -> ConfigError:
    layout = f"{list(tensor.shape)} laid out as {tensor.placements}"
    return ConfigError(f"{name} is {layout}, which a checkpoint cannot hold: must be {wanted}")


def _is_dtensor(tensor: torch.Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
