"""Ranks that train adapters, or a part of the parameters, on many layouts, and save on one what another one loads."""

from __future__ import annotations

import functools
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from layout_cases import UNTIED, Case, run_case, whole
from layout_worker import compare

from dmoe.checkpoint import load_latest, restore_training_state, save_checkpoint, training_state
from dmoe.config import RunConfig
from dmoe.config.train import LoRAConfig
from dmoe.lora.state import adapters_only, check_base, describe_base
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import build_mesh, mesh
from dmoe.parallel.mesh import recent_torch
from dmoe.train.engine import Engine, build_engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step

WORLD = 4
STEPS = {"steps": 2}  # A has a gradient from the second on
LORA = STEPS | {"lora": LoRAConfig(rank=3, alpha=6.0, targets=("attention", "mlp", "experts", "router"))}
BIASES = {"bias": True}

SMALL = {"num_layers": 2}

CASES = {
    "fsdp 2 x ep 2, recomputed": Case(
        {"dp_shard": 4, "ep": 2}, train=LORA | {"activation_checkpointing": True}, model=SMALL
    ),
    "fsdp 2 x tp 2": Case({"dp_shard": 2, "tp": 2}, train=LORA, model=SMALL, moe=BIASES),
    "dp 2 x tp 2 x ep 2, no sp": Case(
        {"dp_replicate": 2, "tp": 2, "ep": 2, "sequence_parallel": False}, train=LORA, model=SMALL | UNTIED
    ),
    "pp 2 x ep 2, zero bubble": Case(
        {"pp": 2, "ep": 2, "schedule": "interleaved_zero_bubble"}, train=LORA, model={"num_layers": 4}
    ),
    "a frozen stage, routers and head, pp 2 x fsdp 2": Case(
        {"pp": 2, "dp_shard": 2}, train=STEPS | {"freeze": ("lm_head", "layers.0", "router")}, model=SMALL
    ),
}  # fmt: skip
SAVED, LOADED = CASES["fsdp 2 x ep 2, recomputed"], Case({"dp_shard": 2, "tp": 2}, train=LORA, model=SMALL)


def supported(case: Case) -> bool:
    """Whether this torch can run a case."""
    return recent_torch() or "zero_bubble" not in case.parallel.get("schedule", "")


def reference(case: Case) -> dict[str, Any]:
    """The numbers of one process."""
    return run_case(case.alone.config("fp64"), spread=False)


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=300))
    mesh.init_device_mesh = functools.cache(mesh.init_device_mesh)  # type: ignore[assignment]
    references = torch.load(Path(folder) / "references.pt", weights_only=True)
    failures = []
    for name, case in CASES.items():
        if not supported(case):
            continue
        try:
            got = run_case(case.config("fp64"), spread=True)
        except Exception as error:
            raise RuntimeError(name) from error
        everyone: list[Any] = [None] * WORLD
        dist.all_gather_object(everyone, compare(got, references[case.reference], 1e-9))
        failures += [f"{name}, rank {r}: {p}" for r, found in enumerate(everyone) for p in found[:3]]
    failures += saved_and_loaded(Path(folder))
    if rank == 0:
        (Path(folder) / "failures").write_text("\n".join(failures))
    dist.barrier()
    leave_process_group()


def saved_and_loaded(folder: Path) -> list[str]:
    """Two steps on one layout, a checkpoint, and a third step there and on another layout that loaded it."""
    config = SAVED.config("fp64")
    engine, optimizer = build(config)
    for step in range(2):
        one_step(engine, optimizer, config, step)
    base = describe_base(config.train)
    state = adapters_only(training_state(engine.parts, optimizer), base)
    save_checkpoint(folder, 2, state)
    saved = adapters(engine)
    wanted = one_step(engine, optimizer, config, 2)

    config = LOADED.config("fp64")
    engine, optimizer = build(config)
    whole_state = training_state(engine.parts, optimizer)
    state = adapters_only(whole_state, base)
    assert load_latest(folder, state, on_refused=print) is not None
    check_base(state["base"], base)
    state["model"] = whole_state["model"] | state["model"]
    restore_training_state(engine.parts, optimizer, state)
    loaded = adapters(engine)
    problems = [f"{name} is not what was saved" for name in saved if not torch.equal(saved[name], loaded[name])]
    loss = one_step(engine, optimizer, config, 2)
    return problems + ([] if abs(loss - wanted) < 1e-10 * wanted else [f"after loading {loss} for {wanted}"])


def build(config: RunConfig) -> tuple[Engine, torch.optim.Optimizer]:
    engine = build_engine(config, torch.device("cpu"), build_mesh(config.parallel))
    return engine, build_optimizer(engine.parts, config.optim)


def one_step(engine: Engine, optimizer: torch.optim.Optimizer, config: RunConfig, step: int) -> float:
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 1000).astype(np.uint16)
    starts = np.random.default_rng(step + 1).integers(0, 900, config.train.batch_size)
    return training_step(engine, optimizer, engine.batch(tokens, starts), config.optim).loss


def adapters(engine: Engine) -> dict[str, torch.Tensor]:
    named = [pair for part in engine.parts for pair in part.named_parameters()]
    return {name: whole(name, p.detach()).clone() for name, p in named if "lora_" in name}
