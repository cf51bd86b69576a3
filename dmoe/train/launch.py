"""Joining the other ranks of a run, and saying which one is missing when a collective fails."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist

from dmoe.config import RunConfig
from dmoe.errors import RunError
from dmoe.parallel import ParallelMesh, build_mesh, check_model, init_process_group, resolve
from dmoe.train.device import rank_device, resolve_device

# What a rank waits for the others to write how far they got: one that is alive fails at the same collective.
_GRACE_SECONDS = 3.0


class HasStep(Protocol):
    """Where a run has got to."""

    step: int


@contextlib.contextmanager
def join_ranks(config: RunConfig) -> Iterator[tuple[torch.device, ParallelMesh | None]]:
    """(device, mesh) of this process; the mesh is None for a process that is alone.

    Joins the process group that torchrun describes, and leaves it afterwards; one that exists is used and left alone.
    """
    joined = dist.is_initialized()
    world_size = dist.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    layout = resolve(config.parallel, world_size)
    if not joined and world_size == 1:
        yield resolve_device(config.train.device), None
        return
    check_model(layout, config.model, config.train)
    device = rank_device(config.train.device, int(os.environ.get("LOCAL_RANK", "0")))
    if joined:
        yield device, build_mesh(config.parallel, device_type=device.type)
        return
    init_process_group(config.parallel, device.type)
    try:
        yield device, build_mesh(config.parallel, device_type=device.type)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def name_missing_ranks(progress: HasStep) -> Iterator[None]:
    """Turn a failed collective into a RunError that names the ranks that did not fail with this one."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        if not dist.is_initialized() or dist.get_world_size() == 1 or not _is_collective(error):
            raise
        raise RunError(_diagnosis(progress.step, error)) from error


def _is_collective(error: BaseException) -> bool:
    words = ("connection", "gloo", "nccl", "timed out", "timeout", "peer")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def _diagnosis(step: int, error: BaseException) -> str:
    """Ranks that are alive report themselves in the store, which outlives them under torchrun."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    reason = " ".join(str(error).split())[:200]
    missing: list[int] | None = None
    with contextlib.suppress(Exception):  # the store may be gone with rank 0
        store = dist.distributed_c10d._get_default_store()
        store.set(f"dmoe/failed/{rank}", str(step))
        deadline = time.monotonic() + _GRACE_SECONDS
        while True:
            missing = [r for r in range(world_size) if not store.check([f"dmoe/failed/{r}"])]
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    where = f"rank {rank}, step {step + 1}: a collective failed"
    if missing is None:
        return f"{where}, and rank 0, which keeps the list of ranks, cannot be reached ({reason})"
    if not missing:
        return f"{where} on every rank ({reason})"
    names = ", ".join(map(str, missing))
    return f"{where}; {'rank' if len(missing) == 1 else 'ranks'} {names} did not answer: died or hangs ({reason})"
