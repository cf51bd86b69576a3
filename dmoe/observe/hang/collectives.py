"""The last collectives of this rank, from the flight recorder that torch keeps for gloo and NCCL alike.

It is a ring buffer in C++ with the Python stack of each call, unread until it is asked for. It has no sends and
receives on gloo: see messages.py.
"""

from __future__ import annotations

import os
import pickle
import time
from typing import Any

import torch
import torch.distributed as dist

_PER_GROUP = 50
# Where torch itself lies, to find who called it.
_TORCH = os.path.dirname(torch.__file__) + os.sep
_TOOLS = os.path.dirname(os.path.dirname(__file__)) + os.sep


def enable_recorder() -> None:
    """Have torch record; before the first collective. Keeps a size that the environment asks for."""
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")


def groups() -> dict[str, dict[str, Any]]:
    """The process groups that this rank is in by name: {"axis", "ranks"}, the ranks in the default group."""
    if not dist.is_initialized():
        return {}
    names = dict(dist.distributed_c10d._world.pg_names)
    return {
        str(name): {"axis": _axis(str(group.group_desc), str(name)), "ranks": dist.get_process_group_ranks(group)}
        for group, name in names.items()
    }


def recorded_collectives() -> list[dict[str, Any]]:
    """The last collectives of each group, oldest first; empty where torch has none.

    {"group", "axis", "number" in the group, "kind", "sizes" and "dtypes" of the inputs, "state": "completed", "started"
    or "waiting", "seconds" since the call, "where": {"file", "line", "function"}, "call": the function of torch}
    """
    entries = [e for e in _flight_record() if not e.get("is_p2p") and "coalesced" not in e["profiling_name"]]
    kept: dict[str, int] = {}
    result = []
    for entry in reversed(entries):
        group = str(entry["process_group"][0])
        kept[group] = kept.get(group, 0) + 1
        if kept[group] <= _PER_GROUP:
            result.append(_collective(entry))
    return result[::-1]


def _flight_record() -> list[dict[str, Any]]:
    """The entries of all backends, oldest first: torch keeps those of NCCL apart from the others."""
    entries: list[dict[str, Any]] = []
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is not None:
            trace = pickle.loads(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))
            entries += trace.get("entries", [])
    return sorted(entries, key=lambda entry: entry["time_created_ns"])


def _collective(entry: dict[str, Any]) -> dict[str, Any]:
    backend, _, kind = entry["profiling_name"].partition(":")
    frames = entry.get("frames") or []
    where = next((f for f in frames if is_callers(f["filename"])), frames[0] if frames else None)
    # gloo marks the end of a collective in "retired" alone.
    done = entry.get("retired") if backend == "gloo" else entry.get("state") == "completed"
    started = entry.get("state") == "started"
    return {
        "group": str(entry["process_group"][0]),
        "axis": _axis(str(entry["process_group"][1]), str(entry["process_group"][0])),
        "number": entry["collective_seq_id"],
        "kind": kind,
        "call": frames[0]["name"] if frames and frames[0]["filename"].endswith("distributed_c10d.py") else kind,
        "sizes": entry.get("input_sizes", []),
        "dtypes": entry.get("input_dtypes", []),
        "state": "completed" if done else "started" if started else "waiting",
        "seconds": round(max(0.0, time.time() - entry["time_created_ns"] / 1e9), 3),
        "where": where and {"file": where["filename"], "line": where["line"], "function": where["name"]},
    }


def is_callers(file: str) -> bool:
    """Whether a file is none of torch's, nor one of the tools that stand between."""
    return not file.startswith((_TORCH, _TOOLS)) and not file.startswith("<")


def _axis(description: str, name: str) -> str:
    """The axis of a mesh, or the number that torch gave a group that nobody described."""
    return name if description in ("", "undefined") else description.removeprefix("mesh_")
