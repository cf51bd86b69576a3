"""A rank of the layout tests: every case of one world size, one after the other."""

from __future__ import annotations

import functools
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layout_cases import CASES, LOSSES, run_case, supported

from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import mesh

# Of loss, auxiliary losses and gradient norm, relative; and of every updated parameter, absolute.
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-9}


def rank_main(rank: int, world: int, folder: str, only: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    # When a rank fails, spawn ends the others. The limit is for a rank that hangs: long, for a busy machine can stand
    # still for a minute.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    # All of the compiler but the generation of C++, which takes half a minute a case.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # Module.compile calls it too
    # Groups for each size of mesh once: each has threads, and hundreds of them slow one another down.
    mesh.init_device_mesh = functools.cache(mesh.init_device_mesh)  # type: ignore[assignment]
    references = torch.load(Path(folder) / "references.pt", weights_only=True)
    failures = []
    for name, case in CASES[world].items():
        if (only and name not in only) or not supported(case):
            continue
        for precision, tolerance in TOLERANCE.items():
            if case.train.get("compile") and precision == "fp32":
                continue  # the compiler takes half of the time of all cases; fp64 has the tighter bound
            torch._dynamo.reset()
            if rank == 0:
                print(f"{name}, {precision}", flush=True)  # shown if a rank dies
            try:
                got = run_case(case.config(precision), spread=True)
            except Exception as error:
                raise RuntimeError(f"{name}, {precision}") from error
            problems = compare(got, references[precision][case.reference], tolerance)
            everyone: list[Any] = [None] * world
            dist.all_gather_object(everyone, problems)
            failures += [f"{name}, {precision}, rank {r}: {p}" for r, found in enumerate(everyone) for p in found[:3]]
    if rank == 0:
        (Path(folder) / "failures").write_text("\n".join(failures))
    dist.barrier()
    leave_process_group()


def compare(got: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> list[str]:
    """What differs, in words."""
    problems = []
    for step, (ours, theirs) in enumerate(zip(got["metrics"], wanted["metrics"])):
        for key in ("loss", "grad_norm", "counts", *LOSSES):
            a, b = torch.tensor(ours[key], dtype=torch.float64), torch.tensor(theirs[key], dtype=torch.float64)
            error = (a - b).abs().max().item() / b.abs().max().item() if a.shape == b.shape else float("inf")
            if not error <= (0 if key == "counts" else tolerance):
                problems.append(f"step {step}: {key} is off by {error:.1e}: {ours[key]} for {theirs[key]}")
    error = abs(got["evaluation"] - wanted["evaluation"]) / abs(wanted["evaluation"])
    if not error <= tolerance:
        problems.append(f"evaluation is off by {error:.1e}")
    for name, weight in got["weights"].items():
        difference = (weight - wanted["weights"][name]).abs().max().item()
        # Adam divides by the size of a gradient, so a rounding of a tiny one moves its weight by up to the step.
        if not difference <= (tolerance if weight.dtype == torch.float64 else 2e-3):
            problems.append(f"{name} is off by {difference:.1e}")
    return problems
