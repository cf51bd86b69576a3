"""A rank of the tests of routing statistics: every case of one world size, one after the other."""

from __future__ import annotations

import functools
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layout_cases import supported
from routing_cases import CASES, config_of, differences, run_case, summary_differences

from dmoe.observe.routing import load
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import mesh


def rank_main(rank: int, world: int, folder: str, expected: dict[str, Any], only: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # Module.compile calls it too
    mesh.init_device_mesh = functools.cache(mesh.init_device_mesh)  # type: ignore[assignment]
    failures = []
    for name, case in CASES[world].items():
        if (only and name not in only) or not supported(case):
            continue
        torch._dynamo.reset()
        run_dir = Path(folder) / name
        try:
            statistics, summary = run_case(config_of(case, run_dir), run_dir, spread=True)
        except Exception as error:
            raise RuntimeError(name) from error
        problems = differences(statistics, expected[name])
        if rank == 0:
            assert summary is not None
            wanted = load(Path(folder) / "alone" / name / "routing" / "step-00000001.npz")
            problems += summary_differences(summary, wanted, 1e-9)
        elif summary is not None:
            problems.append("another rank than the first has a summary")
        everyone: list[Any] = [None] * world
        dist.all_gather_object(everyone, problems)
        failures += [f"{name}, rank {r}: {p}" for r, found in enumerate(everyone) for p in found[:4]]
    if rank == 0:
        (Path(folder) / "failures").write_text("\n".join(failures))
    dist.barrier()
    leave_process_group()
