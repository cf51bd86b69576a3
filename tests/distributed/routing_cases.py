"""What the tests of routing statistics compare: a run of one step on some layout, and the same worked out in numpy."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from layout_cases import Case, starve_experts

from dmoe.config import OptimConfig, RunConfig
from dmoe.moe import moe_layers
from dmoe.observe.routing import RoutingSummary, load
from dmoe.parallel import build_mesh
from dmoe.train.engine import Engine, build_engine
from dmoe.train.optim import build_optimizer
from dmoe.train.routing_probe import RoutingProbe
from dmoe.train.step import training_step

CASES: dict[int, dict[str, Case]] = {
    2: {
        "dp 2": Case({"dp_replicate": 2}),
        "ep 2": Case({"ep": 2}),
        "ep 2, compiled": Case(
            {"ep": 2},
            model={"num_layers": 2},
            moe={"global_aux_loss_coef": 0.0, "seq_aux_loss_coef": 0.0},
            train={"compile": True},
        ),
        "ep 2, padded to capacity": Case({"ep": 2}, moe={"capacity_factor": 4.0, "pad_to_capacity": True}),
        "tp 2": Case({"tp": 2, "sequence_parallel": False}, model={"tie_embeddings": False}),
        "tp 2 sp": Case({"tp": 2}),
        "cp 2 ep 2": Case({"cp": 2, "ep": 2}),
        "pp 2": Case({"pp": 2}),
        "pp 2, a V": Case(
            {"pp": 2, "schedule": "zbv"}, model={"num_layers": 5}, train={"batch_size": 8, "micro_batch_size": 2}
        ),
    },
    4: {
        "ep 4": Case({"ep": 4}),
        "fsdp 2 x ep 2, tokens": Case({"dp_shard": 4, "ep": 2, "ep_sends": "tokens"}),
        "tp 2 x cp 2": Case({"tp": 2, "cp": 2}),
        "pp 2 x ep 2": Case({"pp": 2, "ep": 2}),
    },
}
TOKENS = 107
"""Of the piece: seven windows of 16, the last of them short, in micro-batches of 4 or 2 windows."""


def config_of(case: Case, folder: Path) -> RunConfig:
    config = case.config("fp64")
    return replace(config, profiling=replace(config.profiling, routing_tokens=TOKENS), run_dir=str(folder))


def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 67, 300).astype(np.uint16)


def run_case(config: RunConfig, folder: Path, *, spread: bool) -> tuple[dict[str, Any], RoutingSummary | None]:
    """Statistics of one step of training by layer, and after it the summary of the held-out text, read from its file
    by rank 0."""
    engine = build_engine(config, torch.device("cpu"), build_mesh(config.parallel) if spread else None)
    starve_experts(engine)
    one_step(engine, config)
    statistics = {name: vars(summary) for name, summary in engine.load_summaries().items()}
    data: Any = SimpleNamespace(val=SimpleNamespace(tokens=text()))
    made = RoutingProbe(config, folder, data, engine, 0).save(1)
    if made is None:
        return statistics, None
    kept = load(folder / "routing" / "step-00000001.npz")
    assert same(made, kept), "the file differs from what was made"
    return statistics, kept


def one_step(engine: Engine, config: RunConfig) -> None:
    draw, size = np.random.default_rng(1), config.train.batch_size
    starts, lengths = draw.integers(0, 200, size), draw.integers(0, config.train.seq_len + 1, size)
    optimizer = build_optimizer(engine.parts, config.optim)
    training_step(engine, optimizer, engine.batch(text(), starts, lengths), OptimConfig())


def watch_routers(engine: Engine, seen: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> ExitStack:
    """Collect (ids [T, K], scores [T, E]) of the tokens that are no padding, of every forward by layer name."""
    stack = ExitStack()
    for name, layer in moe_layers(engine.parts[0]).items():

        def see(module: Any, args: Any, routing: Any, name: str = name) -> None:
            valid = routing.valid_T.numpy()
            ids, scores = routing.ids_before_drop.numpy(), routing.scores_TE.detach().numpy()
            seen.setdefault(name, []).append((ids[valid], scores[valid]))

        stack.callback(layer.router.register_forward_hook(see).remove)
    return stack


def expected_statistics(config: RunConfig, ep: int, *, padded: bool) -> dict[str, dict[str, Any]]:
    """By layer, from what the routers of one process did in each forward of the step."""
    engine = build_engine(config, torch.device("cpu"))
    starve_experts(engine)
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    with watch_routers(engine, seen):
        one_step(engine, config)
    experts, expected = config.model.moe.num_experts, {}
    for name, forwards in seen.items():
        counts = np.array([np.bincount(ids.ravel(), minlength=experts) for ids, _ in forwards])
        by_rank = counts.reshape(len(counts), ep, -1).sum(2)
        uneven = ep > 1 and not padded
        expected[name] = {
            "tokens_per_expert": counts.sum(0).tolist(),
            "confidence": np.mean([(s / s.sum(1, keepdims=True)).max(1).mean() for _, s in forwards]),
            "rank_load": (by_rank.sum(0) / counts.sum()).tolist() if ep > 1 else [],
            "rank_max_over_mean": np.mean(by_rank.max(1) / by_rank.mean(1)) if uneven else 1.0,
            "max_of_sum": by_rank.sum(0).max() / by_rank.sum(0).mean(),
        }
    return expected


def differences(got: dict[str, Any], wanted: dict[str, dict[str, Any]]) -> list[str]:
    """Of statistics, in words."""
    problems = [] if list(got) == list(wanted) else [f"layers {list(got)} for {list(wanted)}"]
    for name, values in wanted.items():
        for key in ("tokens_per_expert", "confidence", "rank_load", "rank_max_over_mean"):
            ours, theirs = np.array(got[name][key]), np.array(values[key])
            if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-9, atol=0):
                problems.append(f"{name}: {key} is {ours}: must be {theirs}")
    return problems


def same(a: RoutingSummary, b: RoutingSummary, rtol: float = 0.0) -> bool:
    """Whether two summaries agree: all counts exactly, means of scores to `rtol`."""
    return not summary_differences(a, b, rtol)


def summary_differences(a: RoutingSummary, b: RoutingSummary, rtol: float) -> list[str]:
    problems = []
    for field in fields(RoutingSummary):
        ours, theirs = np.asarray(getattr(a, field.name)), np.asarray(getattr(b, field.name))
        rounds = field.name in ("prob_LE", "entropy_L", "confidence_L", "margin_L")
        if field.name == "name":
            continue
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            problems.append(f"{field.name}: {ours.dtype} {ours.shape} for {theirs.dtype} {theirs.shape}")
        elif not (np.allclose(ours, theirs, rtol=rtol, atol=0) if rounds else np.array_equal(ours, theirs)):
            problems.append(f"{field.name} is {ours.ravel()[:8]}: must be {theirs.ravel()[:8]}")
    return problems
