"""Joining the other ranks of a run, and saying which one is missing when a collective fails."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from dmoe.config import ParallelConfig, RunConfig
from dmoe.errors import DmoeError, RunError
from dmoe.observe.hang.collectives import enable_recorder
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import ParallelMesh, build_mesh, check_model, init_process_group, resolve
from dmoe.train import failures, meeting
from dmoe.train.device import rank_device, resolve_device

# Ranks that start together may differ this much in loading their libraries.
_LOADING = timedelta(seconds=120)


class HasStep(Protocol):
    """Where a run has got to."""

    step: int


@contextlib.contextmanager
def join_ranks(config: RunConfig) -> Iterator[tuple[torch.device, ParallelMesh | None]]:
    """(device, mesh) of this process; the mesh is None for a process that is alone.

    Joins the process group that torchrun describes, and leaves it afterwards; one that exists is used and left alone.
    """
    joined = dist.is_initialized()
    world_size = dist.get_world_size() if joined else failures.launched_world_size()
    layout = resolve(config.parallel, world_size)
    if not joined and world_size == 1:
        yield resolve_device(config.train.device), None
        return
    check_model(layout, config.model, config.train)
    device = rank_device(config.train.device, int(os.environ.get("LOCAL_RANK", "0")))
    if not joined:
        enable_recorder()
        _join(config.parallel, device)
    failures.forget()
    try:
        with name_missing_ranks(), limit_waiting(config.parallel):
            yield device, build_mesh(config.parallel, device_type=device.type)
    except Exception as error:
        failures.leave(error)  # before the others see this rank's connections closed
        raise
    finally:
        if not joined:
            leave_process_group()


@contextlib.contextmanager
def limit_waiting(config: ParallelConfig) -> Iterator[None]:
    """Make `parallel.timeout_seconds` the limit of process groups that are made inside.

    Without it a group gets torch's 10 or 30 minutes, whatever the first group has: those of meshes, of pairs of
    pipeline stages and of background saves. A gloo group's limit for sends and receives cannot be changed afterwards.
    """
    c10d, names = dist.distributed_c10d, ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(c10d, name) for name in names}
    for name in names:
        setattr(c10d, name, timedelta(seconds=config.timeout_seconds))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(c10d, name, value)


@contextlib.contextmanager
def name_missing_ranks(progress: HasStep | None = None) -> Iterator[None]:
    """Turn a failed collective into a RunError that names the ranks that did not fail with this one.

    Args:
        progress: where the run is; None before its first step.
    """
    try:
        yield
    except DmoeError:
        raise
    except (RuntimeError, dist.DistError) as error:
        broken = _broken_collective(error)
        if broken is None or not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        raise RunError(_diagnosis(progress, broken)) from error


def _join(config: ParallelConfig, device: torch.device) -> None:
    rank, world_size = failures.launched_rank(), failures.launched_world_size()
    timeout = timedelta(seconds=config.timeout_seconds)
    try:
        if not meeting.has_agent_store():
            init_process_group(config, device.type)
            return
        patience = max(timeout, _LOADING)
        store = meeting.meet(meeting.agent_store(patience), rank, world_size, patience)
        failures.use(store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split())[:200]
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunError(f"cannot join the {world_size} ranks that meet at {where}: {reason}") from error


def _broken_collective(error: BaseException | None) -> BaseException | None:
    """The failure of a collective that `error` is or comes from: a pipeline wraps what happens in its stages."""
    words = ("connection", "gloo", "nccl", "timed out", "timeout", "peer")
    while error is not None:
        if isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words):
            return error
        error = error.__cause__ or error.__context__
    return None


def _diagnosis(progress: HasStep | None, error: BaseException) -> str:
    reason = " ".join(str(error).split())[:200]
    when = "before the first step" if progress is None else f"in step {progress.step + 1}"
    broken = f"a collective of rank {dist.get_rank()} failed {when}"
    others = failures.others_after_broken_collective(dist.get_world_size())
    if others is None:
        return f"{broken}, and rank 0, which keeps the list of ranks, cannot be reached ({reason})"
    silent, failed = others
    causes = [f"rank {rank} failed: {message}" for rank, message in failed.items()]
    if silent:
        causes.append(f"{_ranks(silent)} did not answer: died or hangs")
    if not causes:
        return f"{broken} and so did one of every other rank ({reason})"
    return f"{'; '.join(causes)}; {broken} ({reason})"


def _ranks(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
