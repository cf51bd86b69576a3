"""Two gloo ranks save and load together; what they wrote also loads in one process."""

import os
import random
import resource
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from dmoe.checkpoint import capture_rng, find_checkpoints, load_checkpoint, load_latest, restore_rng, save_checkpoint
from dmoe.errors import ConfigError, RunError
from dmoe.ops.collectives import leave_process_group

FULL = torch.arange(12.0).reshape(6, 2)


def rank_main(rank: int, run: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    store = torch.distributed.FileStore(str(run / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    work(rank, run)
    leave_process_group()


def work(rank: int, run: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))

    def state(scale: float) -> dict:
        sharded = distribute_tensor(FULL * scale, mesh, [Shard(0)])
        return {"model": {"w": sharded, "b": torch.full((2,), scale)}, "rng": capture_rng(), "trainer": {"x": 1}}

    random.seed(rank)
    torch.manual_seed(rank)
    path = save_checkpoint(run, 1, state(1.0))
    expected = random.random(), torch.rand(2).tolist()
    assert len(list(path.glob("*.distcp"))) == 2, "each rank writes its shards"

    loaded = state(0.0)
    assert load_latest(run, loaded, on_refused=print) == (1, {"x": 1})
    assert torch.equal(loaded["model"]["w"].full_tensor(), FULL)
    assert torch.equal(loaded["model"]["b"], torch.ones(2))
    assert restore_rng(loaded["rng"]) == []
    assert (random.random(), torch.rand(2).tolist()) == expected, "every rank has its own random state"

    # A disk that is full for rank 1 alone is an error on both.
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, resource.RLIM_INFINITY))
    second = state(2.0)
    with pytest.raises(RunError, match=r"File too large; the previous checkpoint step-00000001 is intact"):
        save_checkpoint(run, 2, second)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000001"]

    # So are a fault of rank 0 alone and a state that does not match on rank 1 alone.
    with pytest.raises(RunError, match="missing"):
        load_checkpoint(run / "nowhere", state(0.0))
    wrong = state(0.0)
    if rank == 1:
        wrong["model"]["b"] = torch.zeros(3)
    with pytest.raises(ConfigError, match=r"model\.b has shape \[3\]"):
        load_checkpoint(path, wrong)

    for step in (2, 3):
        save_checkpoint(run, step, state(float(step)))
    torch.distributed.barrier()
    if rank == 0:
        next((run / "checkpoints" / "step-00000003").glob("__1_*.distcp")).write_bytes(b"x")
    torch.distributed.barrier()
    refused: list[str] = []
    result = load_latest(run, loaded, on_refused=refused.append)
    assert result is not None
    assert result[0] == 2
    assert len(refused) == (1 if rank == 0 else 0), "reported once, by rank 0"
    assert torch.equal(loaded["model"]["w"].full_tensor(), FULL * 2)


def test_two_ranks(tmp_path):
    run_ranks(rank_main, (tmp_path,), 2)

    # Resharded: one process, plain tensors, and fewer random states than were saved.
    state = {"model": {"w": torch.zeros(6, 2), "b": torch.zeros(2)}, "rng": capture_rng()}
    assert load_checkpoint(find_checkpoints(tmp_path)[1], state) == (2, {"x": 1})
    assert torch.equal(state["model"]["w"], FULL * 2)
    assert restore_rng(state["rng"]) == []
