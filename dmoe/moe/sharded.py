"""A rank's part of a parameter. Parameters are plain tensors until `dmoe.parallel` spreads them as DTensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.errors import ConfigError


def local(parameter: Any) -> Tensor:
    """This rank's shard of a parameter; a plain tensor is its own shard."""
    return parameter if is_plain(parameter) else parameter.to_local()


def replicated(parameter: Any) -> Tensor:
    """A parameter that ranks hold in full and apply to tokens of their own, so that its gradient is their sum."""
    if is_plain(parameter):
        return parameter
    from torch.distributed.tensor import Partial

    return parameter.to_local(grad_placements=[Partial()] * parameter.device_mesh.ndim)


def replicated_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """`linear` without bias, whose weight ranks hold in full and apply to tokens of their own."""
    return torch.nn.functional.linear(x, replicated(linear.weight))


def is_plain(tensor: Any) -> bool:
    """Whether a tensor is no DTensor."""
    # By type: the compiler answers hasattr(dtensor, "to_local") with no. The import is slow and rarely needed.
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    from torch.distributed.tensor import DTensor

    return not isinstance(tensor, DTensor)


def copy_shard(parameter: Any, whole: Tensor) -> None:
    """Copy this rank's shard of `whole` into a DTensor parameter, without communication."""
    shard = parameter.to_local()
    if shard.numel() == 0:
        return
    for dim, runs in enumerate(owned_indices(parameter)):
        parts = [whole.narrow(dim, run.start, len(run)) for run in runs]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    shard.copy_(whole)


def owned_indices(parameter: Any) -> list[list[range]]:
    """For each dim, the indices of the whole parameter that this rank's shard holds, as runs in rising order.

    The shard is the box product of its dims' indices. A plain tensor owns everything. Most dims have one run; the gate
    and up rows of a tensor-parallel rank are two.

    Raises:
        ConfigError: the shard has another size than its placements say, or is a partial sum.
    """
    if is_plain(parameter):
        return [[range(size)] for size in parameter.shape]
    shard, mesh, placements = parameter.to_local(), parameter.device_mesh, parameter.placements
    if shard.numel() == 0:  # torch gives empty shards any shape; the rank need not even be in the mesh
        return [[] for _ in parameter.shape]
    owned = []
    for dim, size in enumerate(parameter.shape):
        axes = [
            (mesh.size(axis), mesh.get_local_rank(axis), getattr(placement, "split_factor", 1))
            for axis, placement in enumerate(placements)
            if getattr(placement, "dim", None) == dim
        ]
        owned.append(_split([range(size)], axes))
    sizes = tuple(sum(map(len, runs)) for runs in owned)
    if sizes != tuple(shard.shape) or any(placement.is_partial() for placement in placements):
        raise ConfigError(
            f"a parameter {list(parameter.shape)} laid out as {placements} has a shard {list(shard.shape)}: "
            f"must be {list(sizes)}, and no axis Partial"
        )
    return owned


def _split(runs: list[range], axes: list[tuple[int, int, int]]) -> list[range]:
    """What (size, this rank, split factor) of the mesh axes that cut a dim leave of it. Sizes as of `torch.chunk`."""
    if not axes:
        return runs
    (size, rank, factor), rest = axes[0], axes[1:]
    if factor > 1 and factor == math.prod(other for other, _, _ in rest):
        # FSDP over tensor or expert parallel: the later axes cut first, and this one what they leave. Torch's own
        # arithmetic, left to right, has the same result only where sizes divide.
        return _chunk(_split(runs, rest), size, rank)
    # The same part of each of `factor` pieces: gate and up rows. A plain shard is one piece.
    parts = [run for piece in range(factor) for run in _chunk(_chunk(runs, factor, piece), size, rank)]
    return _split(join_runs(parts), rest)


def _chunk(runs: list[range], count: int, index: int) -> list[range]:
    total = sum(map(len, runs))
    size = -(-total // count)
    start, stop, before, chunk = index * size, (index + 1) * size, 0, []
    for run in runs:
        chunk.append(run[max(0, start - before) : max(0, stop - before)])
        before += len(run)
    return [run for run in chunk if run]


def join_runs(runs: list[range]) -> list[range]:
    """The same indices with adjacent runs made one."""
    joined: list[range] = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined
