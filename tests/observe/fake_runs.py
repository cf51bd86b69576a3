"""Run directories with curves like those of real runs: `python tests/observe/fake_runs.py FOLDER` writes a few."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml


def fake_records(
    layers: int = 6, experts: int = 8, steps: int = 1000, log_every: int = 10, eval_every: int = 250, seed: int = 0
) -> list[dict[str, Any]]:
    """Lines of a whole run in file order; `layers` 0 is a dense one."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.2, (layers, experts))
    records: list[dict[str, Any]] = []
    for step in range(log_every, steps + 1, log_every):
        t = step / steps
        loss = 1.7 + 6.6 * np.exp(-7 * t**0.6) + rng.normal(0, 0.04)
        warmup = min(1.0, step / (0.05 * steps))
        seconds = 0.21 + abs(rng.normal(0, 0.012)) + (0.4 if step == log_every else 0)
        record: dict[str, Any] = {
            "kind": "train", "step": step, "tokens": step * 4096, "loss": loss,
            "lr": 3e-3 * warmup * (0.05 + 0.95 * 0.5 * (1 + np.cos(np.pi * t))),
            "grad_norm": 0.4 + 3 * np.exp(-9 * t) + abs(rng.normal(0, 0.08)), "tokens_per_second": 4096 / seconds,
            "step_seconds": seconds, "model_tflops": 0.09 / seconds, "mfu": 0.065 / seconds, "memory_gib": 1.2,
            "skipped_steps": (t > 0.4) + (t > 0.7), "elapsed_seconds": 0.23 * step,
        }  # fmt: skip
        if layers:
            logits = 0.93 * logits + rng.normal(0, 0.05, logits.shape)
            logits[layers // 2, 0] = -4 * t  # an expert that starves
            load = np.exp(logits + rng.normal(0, 0.06, logits.shape))
            load /= load.sum(1, keepdims=True)
            ratio = load.max(1) * experts
            entropy = np.log(experts) * (1 - 0.5 * t ** np.linspace(0.3, 1, layers)) + rng.normal(0, 0.01, layers)
            record |= {
                "aux_loss": 1 + 0.5 * np.exp(-8 * t) + abs(rng.normal(0, 0.01)),
                "z_loss": 4 + 3 * t + rng.normal(0, 0.1),
                "moe_layers": list(range(layers)), "expert_load": load.tolist(), "router_entropy": entropy.tolist(),
                "max_over_mean": ratio.tolist(), "dead_experts": [0] * layers,
            }  # fmt: skip
        records.append(json.loads(json.dumps(record, default=float)))
        if step % eval_every == 0:
            whole = step == steps
            records.append({"kind": "eval", "step": step, "loss": loss + 0.08, "bits_per_byte": (loss + 0.08) * 0.55,
                            "whole": whole, "zlib_bits_per_byte": 1.8})  # fmt: skip
    return records


def write_run(
    folder: Path, records: list[dict[str, Any]], steps: int = 1000, layers: int = 6, experts: int = 8
) -> Path:
    """A run directory with `records` and the other files."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {"num_layers": layers or 6, "moe_layer_freq": int(layers > 0), "moe": {"num_experts": experts, "top_k": 2}}
    config = {"preset": "tiny-moe", "model": model, "train": {"steps": steps}, "optim": {"lr": 3e-3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "model.json").write_text(json.dumps({"num_params": 12_345_678, "num_active_params": 5_100_000}))
    (folder / "sample.txt").write_text("def parse(self, text):\n    if not text:\n        return None\n" * 4)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def main(folder: Path) -> None:
    from dmoe.observe.report import write_report

    for name, layers, experts, steps in (("tiny-moe", 6, 8, 1000), ("large-moe", 48, 128, 4000), ("dense", 0, 8, 1000)):
        records = fake_records(layers, experts, steps)
        records.insert(30, {"kind": "event", "step": 300, "message": "resumed from step-00000300"})
        print(write_report(write_run(folder / name, records, steps, layers, experts)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
