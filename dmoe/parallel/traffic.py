"""Bytes that a rank sends, by axis of the mesh and kind of message: counted as the collectives are called.

The counts are those of the usual algorithms over n ranks: a ring for gather, scatter and reduce (an all-gather of N
bytes sends N (n - 1) / n from each rank, a reduce-scatter too, an all-reduce twice that), and direct messages for an
all-to-all and between pipeline stages. A library may choose a tree or a switch's multicast and send fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.parallel.mesh import ParallelMesh

# Operator -> what it does. Those of `c10d` take a process group, the functional ones its name.
_KINDS = {
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::allreduce_": "all_reduce",
    "c10d::send": "send",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_reduce_": "all_reduce",
    "_c10d_functional::all_to_all_single": "all_to_all",
}
# Not messages, or the receiving end of one that is counted where it is sent.
_SILENT = ("wait_tensor", "_wrap_tensor_autograd", "recv_", "recv_any_source_", "barrier")


class TrafficCounter(TorchDispatchMode):
    """Counts while it is active: `with TrafficCounter(mesh) as counter: ...`, then `counter.sent`.

    It sees real and fake tensors alike, the backward pass included.
    """

    def __init__(self, mesh: ParallelMesh) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        """"axis: kind" -> bytes sent by this rank."""
        self._names = _group_names(mesh)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, (DTensor, AsyncCollectiveTensor)) for kind in types):
            return NotImplemented  # comes back as operators on what it wraps
        result = func(*args, **(kwargs or {}))
        self.count(func, args, kwargs or {}, result)
        return result

    def count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Add what one operator sends."""
        namespace, _, name = func._schema.name.partition("::")
        if namespace not in ("c10d", "_c10d_functional") or name in _SILENT:
            return
        kind = _KINDS.get(func._schema.name)
        if kind is None:
            raise NotImplementedError(f"the traffic of {func._schema.name} is not counted")
        group = _group(args)
        sent = _bytes_sent(kind, group.size(), group.rank(), args, result)
        if sent:
            self.sent[self._label(namespace, kind, group.group_name, _first_tensor(args))] += sent

    def _label(self, namespace: str, kind: str, group_name: str, tensor: Tensor) -> str:
        """Which axis a message belongs to. Axes that span the same ranks may share one group, so what is sent
        decides too: FSDP calls its collectives directly, sums over a batch or all ranks are in fp64."""
        small = tensor.dtype == torch.float64 and tensor.dim() < 2
        axes = self._names.get(group_name, set())
        if kind == "send":
            return "pp: send"
        if kind == "all_reduce" and small:
            whole_batch = namespace == "_c10d_functional"
            return "batch: all_reduce of auxiliary losses" if whole_batch else "world: all_reduce of loss and norm"
        if kind == "all_to_all":
            return "ep: all_to_all"
        if namespace == "c10d" and kind in ("all_gather", "reduce_scatter"):
            what = "experts" if "efsdp" in axes and "fsdp" not in axes else "fsdp"
            phase = f" in {_phase()}" if kind == "all_gather" else ""
            return f"{'efsdp' if what == 'experts' else 'fsdp'}: {kind}{phase}"
        if kind == "all_reduce" and namespace == "c10d" and "dp_replicate" in axes:
            return "dp_replicate: all_reduce"
        for axis in ("tp", "cp"):
            if axis in axes:
                return f"{axis}: {kind}"
        return f"{'ep' if 'ep' in axes else 'pp' if not axes else min(axes)}: {kind}"


def _group_names(mesh: ParallelMesh) -> dict[str, set[str]]:
    """The axes of more than one rank that each process group serves."""
    names: dict[str, set[str]] = {}
    for view in (mesh.dense, mesh.experts, mesh.context):
        for axis, size in zip(view.mesh_dim_names or (), view.shape):
            if size > 1 and axis != "rest":
                names.setdefault(view.get_group(axis).group_name, set()).add(axis)
    return names


def _group(args: Any) -> dist.ProcessGroup:
    """The process group among an operator's arguments: an object, or a name as the last one."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            return dist.ProcessGroup.unbox(arg)
    return _resolve_process_group(args[-1])


def _phase() -> str:
    return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _first_tensor(args: Any) -> Tensor:
    return next(_tensors(args))


def _bytes_sent(kind: str, size: int, rank: int, args: Any, result: Any) -> int:
    if size == 1:
        return 0
    if kind == "all_to_all":  # (input, output splits, input splits, group)
        rows, send = args[0], args[2]
        row_bytes = rows[:1].nbytes if rows.dim() and rows.shape[0] else 0
        return row_bytes * (sum(send) - send[rank])
    if kind == "send":
        return _first_tensor(args).nbytes
    whole = max(t.nbytes for t in _tensors([args, result]))
    return whole * (size - 1) // size * (2 if kind == "all_reduce" else 1)
