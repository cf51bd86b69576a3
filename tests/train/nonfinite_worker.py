"""Ranks whose step is not finite because of one of them; what is said about it is a file."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from nonfinite_cases import Run, config, poison_gradient, poison_output

from dmoe.ops.collectives import leave_process_group
from dmoe.parallel.mesh import recent_torch

WORLD = 4
EXPERTS = "layers.1.mlp.experts"
EXPERT_PARALLEL = {"dp_shard": 4, "ep": 2}
STAGES = {"pp": 2, "ep": 2}
SPLIT_BACKWARD = {"pp": 2, "dp_shard": 2, "schedule": "interleaved_zero_bubble"}


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=100))
    lines = {}

    run = Run(config(EXPERT_PARALLEL, activation_checkpointing=True), spread=True)
    undo = poison_output(run.module(EXPERTS), math.nan, slice(0, 1)).remove if rank == 1 else None
    lines["output"] = said(run, undo)

    with torch.no_grad():
        shard = run.module(EXPERTS).down_proj.to_local()
        old = shard.clone()
        if rank == 3:
            shard[-1, 0, 0] = math.inf
    lines["weight"] = said(run, lambda: shard.data.copy_(old))

    run.explainer._left = 3
    undo = poison_gradient(run.module("layers.0.mlp.experts")) if rank == 2 else None
    lines["gradient"] = said(run, undo)
    assert run.step(1).finite  # the ranks still agree about everything

    run = Run(config(STAGES), spread=True)
    first, second = run.module("layers.0.self_attn.o_proj"), run.module("layers.1.self_attn.o_proj")
    undo = poison_output(first).remove if first is not None and rank == 1 else None
    lines["first stage"] = said(run, undo)
    undo = poison_output(second).remove if second is not None else None
    lines["last stage"] = said(run, undo)
    undo = poison_gradient(second) if second is not None and rank == 3 else None
    lines["gradient of the last stage"] = said(run, undo)
    assert run.step(1).finite

    if recent_torch():
        run = Run(config(SPLIT_BACKWARD, num_layers=4), spread=True)
        spoiled = run.module("layers.2.mlp.experts")  # the second stage of the first rank of each pipeline
        undo = poison_output(spoiled).remove if rank == 1 else None
        lines["split backward"] = said(run, undo)
        assert run.step(1).finite

    gathered: list[dict[str, list[str]]] = [{}] * WORLD
    dist.all_gather_object(gathered, lines)
    assert all(other == lines for other in gathered), "the ranks say different things"
    if rank == 0:
        (Path(folder) / "lines.json").write_text(json.dumps(lines))
    leave_process_group()


def said(run: Run, undo: object) -> list[str]:
    assert not run.step().finite
    if callable(undo):
        undo()
    return run.lines
