"""Ranks that hang on purpose, each in its own way, until all have written where they are; the writing is kept."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dmoe.config import ProfilingConfig
from dmoe.observe.hang import HangWatch
from dmoe.observe.hang.collectives import enable_recorder
from dmoe.ops.regions import region

WORLD = 4
TIMEOUT = 1.5


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    enable_recorder()
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=100))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "ep"))
    timed_out(rank, Path(folder) / "timed_out-live")
    for case in (skipped, subgroup, loading, pipeline, crossed):
        run_dir = Path(folder) / f"{case.__name__}-live"
        with HangWatch(ProfilingConfig(hang_timeout=TIMEOUT), run_dir) as watch:
            watch.begin(1)
            with region("forward"):
                dist.all_reduce(torch.ones(3))
            watch.end(1)
            watch.begin(2)
            case(rank, mesh, run_dir)
            watch.end(2)
            watch.close()
        dist.barrier()
        if case is skipped and rank == 0:  # what is left of one that went on
            shutil.copytree(run_dir, Path(folder) / "recovered")


def hold(run_dir: Path) -> None:
    """Do not come until all ranks have written, and keep what they wrote."""
    keep(run_dir, run_dir.with_name(run_dir.name.removesuffix("-live")))


def keep(run_dir: Path, kept: Path) -> None:
    begun, deadline = time.time(), time.monotonic() + 60
    files = [run_dir / "hang" / f"rank{rank}.json" for rank in range(WORLD)]
    while not all(f.exists() and json.loads(f.read_text())["time"] > begun for f in files):
        assert time.monotonic() < deadline, "the ranks did not write"
        time.sleep(0.05)
    shutil.copytree(run_dir, kept)


def skipped(rank: int, mesh: DeviceMesh, run_dir: Path) -> None:
    """Rank 1 does not come to an all-reduce of all."""
    with region("backward"):
        if rank == 1:
            hold(run_dir)
        dist.all_reduce(torch.ones(4))


def subgroup(rank: int, mesh: DeviceMesh, run_dir: Path) -> None:
    """Rank 2 does not come to an exchange with rank 3; the others wait for both in something else."""
    group = mesh.get_group("ep")
    if rank == 2:
        hold(run_dir)
    rows = torch.ops._c10d_functional.all_to_all_single(torch.ones(4), [2, 2], [2, 2], group.group_name)
    torch.ops._c10d_functional.wait_tensor(rows)
    gathered = [None] * WORLD
    dist.all_gather_object(gathered, {"rank": rank})


def loading(rank: int, mesh: DeviceMesh, run_dir: Path) -> None:
    """Rank 3 reads its data for ever, with a collective under way that the others have not come to."""
    if rank in (2, 3):  # the others of "ep" come to theirs late, but all do
        work = dist.all_reduce(torch.ones(2), group=mesh.get_group("ep"), async_op=True)
    with region("data"):
        if rank == 3:
            hold(run_dir)
    dist.all_reduce(torch.ones(4))
    if rank in (2, 3):
        work.wait()


def pipeline(rank: int, mesh: DeviceMesh, run_dir: Path) -> None:
    """Rank 0 does not send its second message to rank 2."""
    group = mesh.get_group("pp")
    for i in range(2):
        if rank == 0 and i == 1:
            hold(run_dir)
        if rank == 0:
            for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, torch.ones(5), 2, group)]):
                work.wait()
        elif rank == 2:
            dist.recv(torch.ones(5), 0, group=group)
    dist.barrier()


def timed_out(rank: int, run_dir: Path) -> None:
    """A collective fails before the watch sees anything: rank 1, which sleeps, hears of it and writes where it is."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    broke = False
    try:
        with HangWatch(ProfilingConfig(hang_timeout=60.0), run_dir) as watch:
            watch.begin(1)
            if rank == 1:
                hold(run_dir)
            else:
                dist.all_reduce(torch.ones(6), group=group)
    except RuntimeError:
        broke = True
    assert broke == (rank != 1)
    dist.barrier()


def crossed(rank: int, mesh: DeviceMesh, run_dir: Path) -> None:
    """Rank 2 leaves out an all-reduce and calls the next thing instead. Nobody returns from it."""
    if rank == 0:
        threading.Thread(target=hold, args=(run_dir,), daemon=True).start()
    threading.Thread(target=_end, args=(run_dir,), daemon=True).start()
    try:
        if rank != 2:
            dist.all_reduce(torch.ones(7))
        dist.broadcast(torch.ones(9), 0)
        time.sleep(100)
    except RuntimeError:  # another rank has ended
        time.sleep(100)


def _end(run_dir: Path) -> None:
    kept = run_dir.with_name("crossed")
    while not all((kept / "hang" / f"rank{rank}.txt").exists() for rank in range(WORLD)):
        time.sleep(0.05)
    time.sleep(0.5)
    os._exit(0)
