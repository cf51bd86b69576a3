"""What one checkpoint holds, apart from the live tensors or not: the input of the writer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dmoe.checkpoint import tree
from dmoe.checkpoint.stored_form import stored_form


@dataclass
class Snapshot:
    """Tensors in stored form (nested) and JSON values. `data` has the content of tensors by dotted name, where
    `tensors` only says where they lie."""

    tensors: tree.Tree
    values: tree.Tree
    data: dict[str, torch.Tensor] = field(default_factory=dict)


def live_snapshot(state: dict[str, Any]) -> Snapshot:
    """The state itself: what is written is what the tensors hold at that time. Raises as `tree.split` does."""
    tensors, values = tree.split(state)
    return Snapshot(tree.map_tensors(tensors, stored_form), values)


class HostCopies:
    """Copies of a state in CPU memory, in buffers that are used again by the next one."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, state: dict[str, Any]) -> Snapshot:
        """Copy this rank's part of every tensor, over the last copy; when it returns, the state may change."""
        live = live_snapshot(state)
        old, self._buffers = self._buffers, {}

        def copy(name: str, tensor: torch.Tensor) -> torch.Tensor:
            local, outline = _parts(tensor)
            buffer = old.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            self._buffers[name] = buffer.copy_(local, non_blocking=True)
            return buffer if outline is None else outline

        with torch.no_grad():
            tensors = tree.map_tensors(live.tensors, copy)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return Snapshot(tensors, live.values, dict(self._buffers))


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the data on this rank, for a DTensor: one of the same layout without data)."""
    from torch.distributed.tensor import DTensor

    if not isinstance(tensor, DTensor):
        return tensor.detach(), None
    local = tensor.to_local().detach()
    # A DTensor on a GPU mesh cannot hold CPU memory, but one without memory may be on any mesh.
    outline = DTensor.from_local(
        torch.empty_like(local, device="meta"),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return local, outline
