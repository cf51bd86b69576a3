"""Ranks that train, save, and load what other layouts saved; the checkpoint and the numbers to compare are files."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from layout_cases import Case, whole

from dmoe.checkpoint import load_latest, restore_training_state, save_checkpoint, training_state
from dmoe.config import RunConfig
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import build_mesh
from dmoe.train.engine import Engine, build_engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step

SAVED = Case({"dp_shard": 4, "ep": 2})
LOADED = {
    1: {"one process": Case({})},
    2: {"ep 2": Case({"ep": 2}), "tp 2": Case({"tp": 2})},
    8: {"pp 2 x fsdp 2 x ep 2": Case({"pp": 2, "dp_shard": 4, "ep": 2})},
}
STEPS = 3


def rank_main(rank: int, world: int, folder: str, cases: dict[str, Case], save: bool) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store-{world}-{save}", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    for name, case in cases.items():
        if save:
            train_and_save(case.config("fp32"), Path(folder))
        else:
            load_and_compare(name, case.config("fp32"), Path(folder), spread=True)
        dist.barrier()
    leave_process_group()


def train_and_save(config: RunConfig, folder: Path) -> None:
    """Some steps, a checkpoint, and after it one more, whose loss the others must find."""
    engine = build_engine(config, torch.device("cpu"), build_mesh(config.parallel))
    optimizer = build_optimizer(engine.parts, config.optim)
    for step in range(STEPS):
        one_step(engine, optimizer, config, step)
    save_checkpoint(folder, STEPS, training_state(engine.parts, optimizer))
    whole = whole_state(engine, optimizer)
    loss = one_step(engine, optimizer, config, STEPS)
    if dist.get_rank() == 0:
        torch.save({"state": whole, "loss": loss}, folder / "expected.pt")


def load_and_compare(name: str, config: RunConfig, folder: Path, *, spread: bool) -> None:
    mesh = build_mesh(config.parallel) if spread else None
    engine = build_engine(config, torch.device("cpu"), mesh)
    optimizer = build_optimizer(engine.parts, config.optim)
    state: dict[str, Any] = training_state(engine.parts, optimizer)
    loaded = load_latest(folder, state, on_refused=print)
    assert loaded is not None
    assert loaded[0] == STEPS
    restore_training_state(engine.parts, optimizer, state)
    expected = torch.load(folder / "expected.pt", weights_only=True)
    mine = whole_state(engine, optimizer)
    assert mine.keys() <= expected["state"].keys()
    assert spread or mine.keys() == expected["state"].keys()
    for key, value in mine.items():
        assert torch.equal(value, expected["state"][key]), f"{name}: {key} is not what was saved"
    loss = one_step(engine, optimizer, config, STEPS)
    assert abs(loss - expected["loss"]) <= 1e-6 * abs(expected["loss"]), f"{name}: {loss} for {expected['loss']}"


def one_step(engine: Engine, optimizer: torch.optim.Optimizer, config: RunConfig, step: int) -> float:
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 1000).astype(np.uint16)
    starts = np.random.default_rng(step + 1).integers(0, 900, config.train.batch_size)
    return training_step(engine, optimizer, engine.batch(tokens, starts), config.optim).loss


def whole_state(engine: Engine, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every weight and moment of this rank's parts, assembled: "name" and "name/moment"."""
    result = {}
    for part in engine.parts:
        for name, parameter in part.named_parameters():
            values = {name: parameter.detach()} | {f"{name}/{k}": v for k, v in optimizer.state[parameter].items()}
            result |= {key: whole(key.replace("/", "."), value) for key, value in values.items()}
    return result
