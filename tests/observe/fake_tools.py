"""What the tools that watch a run leave in its directory, made up: kept routing, timeline, memory, traces, a hang."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ["def", "return", " self", "\n", "    ", " the", "import", " numpy", "<b>bold", "==", "0", "x"]


def add_routing(folder: Path, steps: tuple[int, ...], layers: int = 3, experts: int = 8, tokens: int = 300) -> None:
    """Summaries at `steps` of one text, whose picks change less and less."""
    from dmoe.observe.routing import RoutingAccumulator, save

    rng = np.random.default_rng(0)
    ids_T = rng.integers(0, len(WORDS), tokens)
    taste_LWE = rng.normal(0, 2, (layers, len(WORDS), experts))
    for i, step in enumerate(steps):
        accumulator = RoutingAccumulator(list(range(layers)), experts, 2)
        for layer in range(layers):
            noise_TE = rng.normal(0, 3.0 / (i + 1), (tokens, experts))
            probs_TE = np.exp(taste_LWE[layer][ids_T] + noise_TE)
            probs_TE /= probs_TE.sum(axis=1, keepdims=True)
            accumulator.add(layer, np.argsort(-probs_TE, axis=1)[:, :2].copy(), probs_TE, ids_T)
        save(folder / "routing" / f"step-{step:08d}.npz", accumulator.summary(step=step, name=folder.name))


def add_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="x")).save(str(folder / "tokenizer.json"))


def timeline_summary(ranks: int = 4) -> dict[str, Any]:
    base = {"data": 0.004, "forward": 0.06, "backward": 0.11, "routing": 0.02, "experts": 0.09, "exchange": 0.05,
            "sync": 0.02, "optimizer": 0.03}  # fmt: skip
    regions = {name: [seconds * (1 + 0.02 * r) for r in range(ranks)] for name, seconds in base.items()}
    regions["forward"][2] += 0.08
    total = [sum(values[r] for values in regions.values()) for r in range(ranks)]
    waiting = [0.002 if r == 2 else 0.07 for r in range(ranks)]
    stragglers = [{"rank": 2, "region": "forward", "seconds_behind": 0.0815, "steps": 37}]
    return {"ranks": ranks, "rank_ids": list(range(ranks)), "missing": [], "steps": [2, 60], "regions": regions,
            "step_seconds": total, "waiting": waiting, "stragglers": stragglers}  # fmt: skip


def memory_summary(ranks: int = 4) -> dict[str, Any]:
    gib = 2**30
    found = []
    for r in range(ranks):
        peak = {"weights": 2 * gib, "gradients": 2 * gib, "optimizer": 4 * gib, "activations": (3 + (r == 1)) * gib}
        forward = peak | {"gradients": 0}
        curve = [[0.01 * i, 8 * gib + 3 * gib * np.sin(np.pi * i / 200)] for i in range(201)]
        last = peak | {"activations": 0}
        found.append({"rank": r, "peak_bytes": sum(peak.values()), "categories": peak, "curve": curve,
                      "phases": {"forward": forward, "backward": peak, "optimizer": last}})  # fmt: skip
    estimate = {"weights": 2 * gib, "gradients": 2 * gib, "optimizer": 4 * gib, "activations": 2.5 * gib}
    return {"ranks": found, "estimate": estimate, "device": "cpu"}


def add_profiling(folder: Path, ranks: int = 4) -> None:
    for name, summary in (("timeline", timeline_summary(ranks)), ("memory", memory_summary(ranks))):
        (folder / "profiling" / name).mkdir(parents=True, exist_ok=True)
        (folder / "profiling" / name / "summary.json").write_text(json.dumps(summary))
    (folder / "profiling" / "trace").mkdir()
    for name in ("rank0.json.gz", "rank0_cpu.txt", "rank1.json.gz"):
        (folder / "profiling" / "trace" / name).write_bytes(b"")


def add_hang(folder: Path) -> None:
    from dmoe.observe.hang.record import describe_rank, write_record

    record = describe_rank("a step took longer than 60 s", step=640, phase="step", region="exchange", state="stuck")
    write_record(folder / "hang", record)


def with_ranks(records: list[dict[str, Any]], ranks: int = 4) -> list[dict[str, Any]]:
    """Train lines with what expert-parallel ranks add to them, and with confidence and drops."""
    rng = np.random.default_rng(1)
    out = []
    for record in records:
        if record["kind"] == "train" and "expert_load" in record:
            load_LE = np.array(record["expert_load"])
            load_LR = load_LE.reshape(len(load_LE), ranks, -1).sum(axis=2)
            imbalance = float((load_LR.max(axis=1) * ranks).mean())
            record = record | {
                "rank_load": load_LR.round(5).tolist(), "ep_imbalance": imbalance,
                "ep_imbalance_cost": (1 - 1 / imbalance) * 0.4,
                "router_confidence": (0.4 + 0.3 * record["step"] / 1000 + rng.normal(0, 0.01, len(load_LE))).tolist(),
                "dropped": abs(rng.normal(0, 0.01, len(load_LE))).tolist(),
            }  # fmt: skip
        out.append(record)
    return out
