"""One rank of test_sinkhorn.py: the tokens of one batch spread unevenly over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dmoe.ops import sinkhorn
from dmoe.ops.collectives import leave_process_group

SIZES = [[5, 12], [0, 3], [7, 0], [0, 0], [1, 1]]
"""Tokens of each rank, case by case."""


def rank_main(rank: int, world: int, store_path: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for case, sizes in enumerate(SIZES):
        for options in ({}, {"max_iterations": 3}, {"tolerance": 0.1}):
            generator = torch.Generator().manual_seed(case)
            whole = torch.randn(sum(sizes), 6, generator=generator) * 3 + torch.arange(6)
            want = sinkhorn(whole, **options).split(sizes)[rank]
            got = sinkhorn(whole.split(sizes)[rank], group=dist.group.WORLD, **options)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        valid = torch.rand(sum(sizes), generator=generator) < 0.5
        want = sinkhorn(whole, valid_T=valid).split(sizes)[rank]
        got = sinkhorn(whole.split(sizes)[rank], valid_T=valid.split(sizes)[rank], group=dist.group.WORLD)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    dist.barrier()
    leave_process_group()
