"""Gradients that travel early between two ranks, with the kernels in the interpreter."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from dispatch_early import gradients_travel_while_weights_are_computed
from ranks import run_ranks

from dmoe.ops.collectives import leave_process_group


def rank_main(rank: int, world: int, store_path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store_path, world), rank=rank, world_size=world)
    assert dist.group.WORLD is not None
    gradients_travel_while_weights_are_computed(dist.group.WORLD, "cpu", torch.float32)
    dist.barrier()
    leave_process_group()


def test_gradients_travel_early(tmp_path: Path) -> None:
    run_ranks(rank_main, (2, str(tmp_path / "store")), 2)
