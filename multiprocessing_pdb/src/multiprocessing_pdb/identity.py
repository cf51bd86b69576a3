"""Who this process is: its rank among how many, its name within the job, and the job's name."""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
from dataclasses import dataclass

JOB_VARIABLE = "MULTIPROCESSING_PDB_JOB"


@dataclass(frozen=True)
class Identity:
    """A process of a job. `key` is what `rank` and `attach` take: the rank, or the pid of what is no rank itself."""

    key: str
    label: str
    pid: int
    rank: int | None
    world_size: int | None


def identity() -> Identity:
    """Of this process, now: a process group may have been made since the last call."""
    pid, rank, world_size = os.getpid(), *_rank()
    child = multiprocessing.parent_process() is not None and not _has_own_group()
    if rank is None:
        name = multiprocessing.current_process().name if child else "main"
        return Identity(str(pid), f"{name} pid {pid}", pid, None, None)
    of = f"rank {rank}/{world_size}"
    if child:  # a worker that a rank has started
        name = multiprocessing.current_process().name
        return Identity(str(pid), f"{of} {name} pid {pid}", pid, rank, world_size)
    return Identity(str(rank), f"{of} pid {pid}", pid, rank, world_size)


def _rank() -> tuple[int | None, int | None]:
    if _has_own_group():
        group = sys.modules["torch.distributed"]
        return group.get_rank(), group.get_world_size()
    rank, world_size = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if rank.isdigit() and world_size.isdigit():
        return int(rank), int(world_size)
    return None, None


def _has_own_group() -> bool:
    """Whether this process, not one that it was forked from, is in a process group of torch. Never imports torch."""
    group = sys.modules.get("torch.distributed")
    return group is not None and group.is_available() and group.is_initialized() and _forked_at != os.getpid()


_forked_at: int | None = None


def _after_fork() -> None:
    global _forked_at
    _forked_at = os.getpid()


os.register_at_fork(after_in_child=_after_fork)


def job_name() -> str:
    """The same in all processes of a job: of the launcher's address and port, else handed down to children."""
    if JOB_VARIABLE not in os.environ:
        port = os.environ.get("MASTER_PORT")
        if port:
            parts = [os.environ.get("TORCHELASTIC_RUN_ID", "job"), os.environ.get("MASTER_ADDR", ""), port]
            name = "-".join(part for part in parts if part)
        else:
            name = f"job-{os.getpid()}"
        os.environ[JOB_VARIABLE] = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:40]
    return os.environ[JOB_VARIABLE]
