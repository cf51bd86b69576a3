"""The gradient norm over parameters that are spread over different meshes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dmoe.moe.sharded import is_plain
from dmoe.parallel.mesh import ParallelMesh


@torch.no_grad()
def local_gradients(parameters: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(parameter, this rank's part of its gradient); what is still to be summed over ranks is summed here."""
    pairs = []
    for parameter in parameters:
        gradient: Any = parameter.grad
        if gradient is None:
            continue
        if not is_plain(gradient):
            placements = parameter.placements  # type: ignore[attr-defined]
            if gradient.placements != placements:
                parameter.grad = gradient = gradient.redistribute(placements=placements)
            gradient = gradient.to_local()
        pairs.append((parameter, gradient))
    return pairs


@torch.no_grad()
def squared_norm_share(
    gradients: list[tuple[Tensor, Tensor]], mesh: ParallelMesh | None, skip: Tensor | None = None
) -> Tensor:
    """fp64 scalar; its sum over all ranks is the squared norm of the whole gradient.

    A part that several ranks hold counts in each by the inverse of their number, so one sum over all ranks serves
    every mesh. `skip` is a parameter that counts elsewhere (a tied embedding's second copy).
    """
    # Once: the mesh works its ranks out anew at every question.
    stage_size = 1 if mesh is None else mesh.dense.size() // mesh.config.pp
    by_copies: dict[int, list[Tensor]] = {}
    for parameter, gradient in gradients:
        if parameter is not skip and gradient.numel():
            by_copies.setdefault(_copies(parameter, stage_size), []).append(gradient)
    total = torch.zeros((), dtype=torch.float64, device=gradients[0][1].device if gradients else None)
    for copies, parts in by_copies.items():
        norms = torch.stack(torch._foreach_norm(parts)).double()
        total += norms.square().sum() / copies
    return total


def _copies(parameter: Any, stage_size: int) -> int:
    """How many of the ranks of a pipeline stage hold the same part of a parameter."""
    if is_plain(parameter):
        return stage_size
    sizes = zip(parameter.device_mesh.shape, parameter.placements)
    return stage_size // math.prod(size for size, placement in sizes if not placement.is_replicate())


@torch.no_grad()
def scale_gradients(gradients: list[tuple[Tensor, Tensor]], factor: float) -> None:
    """Multiply in place."""
    if gradients:
        torch._foreach_mul_([gradient for _, gradient in gradients], factor)
