"""A rank of test_checkpoint_async.py: saves in the background that race with training, fail, or are killed."""

import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dmoe.checkpoint import AsyncSaver, find_checkpoints, load_latest, manifest, verify_checkpoint
from dmoe.errors import ConfigError, RunError

FULL = torch.arange(48.0).reshape(4, 6, 2)
NAME = "experts.gate_up_proj"


class Gate:
    """Holds the writer of every rank before the manifest until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.describe = manifest.describe

    def __call__(self, paths: object) -> object:
        assert self.open.wait(60)
        return self.describe(paths)


def make(mesh: object, scale: float) -> dict:
    model = {NAME: distribute_tensor(FULL * scale, mesh, [Shard(0)]), "b": torch.full((2,), scale)}
    return {"model": model, "rng": {f"rank{dist.get_rank()}": {"x": torch.tensor(scale)}}, "trainer": {"x": [scale]}}


def change(state: dict) -> None:
    for tensor in state["model"].values():
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(-1)
    state["rng"][f"rank{dist.get_rank()}"]["x"].fill_(-1)
    state["trainer"]["x"][0] = -1


def check(run: Path, mesh: object, step: int) -> None:
    loaded = make(mesh, 0.0)
    assert load_latest(run, loaded, on_refused=print) == (step, {"x": [float(step)]})
    assert torch.equal(loaded["model"][NAME].full_tensor(), FULL * step)
    assert torch.equal(loaded["model"]["b"], torch.full((2,), float(step)))
    assert loaded["rng"][f"rank{dist.get_rank()}"]["x"] == step


def names(run: Path) -> list[str]:
    dist.barrier()
    found = sorted(path.name for path in (run / "checkpoints").iterdir())
    dist.barrier()
    return found


def training_goes_on(run: Path, mesh: object, saver: AsyncSaver) -> None:
    manifest.describe = gate = Gate()
    state = make(mesh, 1.0)
    assert saver.wait() is None
    saver.save(run, 1, state)
    change(state)
    for _ in range(20):  # collectives of training beside those of the save
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.tolist() == [2.0] * 3
    assert find_checkpoints(run) == [], "save returned only after writing"
    dist.barrier()
    gate.open.set()
    assert saver.wait() == run / "checkpoints" / "step-00000001"
    check(run, mesh, 1)

    # A second save waits for the first, into whose copies it would write.
    manifest.describe = gate = Gate()
    saver.save(run, 2, make(mesh, 2.0))
    threading.Timer(0.5, gate.open.set).start()
    began = time.monotonic()
    saver.save(run, 3, make(mesh, 3.0))
    assert time.monotonic() - began > 0.3
    saver.wait()
    assert names(run) == ["latest", "step-00000002", "step-00000003"]
    check(run, mesh, 3)
    verify_checkpoint(find_checkpoints(run)[1])
    manifest.describe = gate.describe


def failures(run: Path, mesh: object, saver: AsyncSaver) -> None:
    rank = dist.get_rank()
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    for end in ("wait", "save"):
        if rank == 1:  # a disk that is full for one rank is an error on both
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
        saver.save(run, 4, make(mesh, 4.0))
        message = r"cannot write checkpoint .*step-00000004: File too large; the previous .* step-00000003 is intact"
        with pytest.raises(RunError, match=message):
            saver.wait() if end == "wait" else saver.save(run, 5, make(mesh, 5.0))
        resource.setrlimit(resource.RLIMIT_FSIZE, infinite)
        assert saver.wait() is None, "raised once"
        assert names(run) == ["latest", "step-00000002", "step-00000003"]
    bad = make(mesh, 4.0)
    if rank == 1:
        bad["trainer"]["x"] = object()
    with pytest.raises(TypeError, match=r"trainer\.x is neither"):
        saver.save(run, 4, bad)
    with pytest.raises(ConfigError, match=r"checkpoint\.keep is 0"):
        saver.save(run, 4, make(mesh, 4.0), keep=0)
    check(run, mesh, 3)
    saver.save(run, 4, make(mesh, 4.0))
    saver.wait()
    check(run, mesh, 4)


def killed(run: Path, mesh: object, saver: AsyncSaver) -> None:
    manifest.describe = Gate()
    saver.save(run, 5, make(mesh, 5.0))
    while not list((run / "checkpoints").glob(".tmp-step-00000005-*/.metadata")):
        time.sleep(0.01)
    (run / f"killed{dist.get_rank()}").touch()
    dist.barrier()
    os.kill(os.getpid(), signal.SIGKILL)


def rank_main(rank: int, run: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(run / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    with AsyncSaver() as saver:
        training_goes_on(run, mesh, saver)
        failures(run, mesh, saver)
        killed(run, mesh, saver)
