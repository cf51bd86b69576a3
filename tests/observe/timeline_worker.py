"""Ranks that train a tiny model with one of them slowed down, each run with its timeline in a folder of its own."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from layout_cases import FIVE, Case

from dmoe.config import ProfilingConfig, RunConfig
from dmoe.moe import moe_layers
from dmoe.observe.timeline import picture, stragglers
from dmoe.ops.collectives import leave_process_group
from dmoe.ops.regions import region
from dmoe.parallel import build_mesh, mesh
from dmoe.train.engine import Engine, build_engine
from dmoe.train.observers import Observers
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step

NAP = 0.2
STEPS = 7


@dataclass(frozen=True)
class Planted:
    """A layout, and where one rank sleeps: in "forward", "experts" or "data", or nowhere."""

    case: Case
    where: str = ""
    rank: int = -1
    traced: bool = False
    """Whether the profiler runs too."""


RUNS: dict[int, dict[str, Planted]] = {
    2: {
        "ep": Planted(Case({"ep": 2}), traced=True),
        "fsdp-data": Planted(Case({"dp_shard": 2}), "data", 0),
        "ep-experts": Planted(Case({"ep": 2}, train={"activation_checkpointing": True}), "experts", 1),
        "tp-forward": Planted(Case({"tp": 2}), "forward", 1),
        "zero-bubble-forward": Planted(
            Case({"pp": 2, "schedule": "interleaved_zero_bubble"}, model=FIVE), "forward", 1
        ),
    },
    4: {
        "fsdp-ep": Planted(Case({"dp_shard": 4, "ep": 2})),
        "fsdp-ep-forward": Planted(Case({"dp_shard": 4, "ep": 2}), "forward", 2),
    },
}


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    # Groups for each size of mesh once: each has threads.
    mesh.init_device_mesh = functools.cache(mesh.init_device_mesh)  # type: ignore[assignment]
    # The machine of a test may be busy with others: ranks stand still by turns, and a step takes many times as long.
    stragglers.MIN_SECONDS, stragglers.MIN_SHARE = NAP / 2, 0.0
    picture.draw_timeline = lambda *_: None  # type: ignore[assignment]  # half of the time, and tested elsewhere
    for name, planted in RUNS[world].items():
        run_steps(planted, Path(folder) / name, slow=rank == planted.rank)
        dist.barrier()
    leave_process_group()


def run_steps(planted: Planted, run_dir: Path, *, slow: bool) -> None:
    profiling = ProfilingConfig(timeline=True, trace=planted.traced, trace_wait=2, trace_warmup=1, trace_active=1)
    config = replace(planted.case.config("fp32"), profiling=profiling)
    engine = build_engine(config, torch.device("cpu"), build_mesh(config.parallel))
    optimizer = build_optimizer(engine.parts, config.optim)
    observers = Observers(config, run_dir, engine, optimizer)
    with observers, asleep(engine, planted.where) if slow else contextlib.nullcontext():
        for step in range(1, STEPS + 1):
            with observers.step(step):
                with region("data"):
                    if slow and planted.where == "data":
                        time.sleep(NAP)
                    batch = engine.batch(tokens(config), np.arange(config.train.batch_size) * 20 + step)
                training_step(engine, optimizer, batch, config.optim)


def tokens(config: RunConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, config.model.vocab_size, 1000).astype(np.uint16)


@contextlib.contextmanager
def asleep(engine: Engine, where: str) -> Iterator[None]:
    """Sleep before each forward of the model's last part, or in that of its first layer of experts."""
    part = engine.parts[-1]
    if where == "experts":
        experts = next(iter(moe_layers(part).values())).experts
        experts.local_weights = delayed(experts.local_weights)  # type: ignore[method-assign]
    handle = part.register_forward_pre_hook(lambda *_: time.sleep(NAP if where == "forward" else 0))
    yield
    handle.remove()


def delayed(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        time.sleep(NAP)
        return function(*args)

    return call
