"""Everything that needs several GPUs of one host, in one command: exchange, experiments, layouts, layer and training.

    python benchmarks/many_gpus.py --out FOLDER [--ranks 8] [--limit 560]

Runs the other benchmarks and the experiments of `moe_exp/` under torchrun, each with a time limit of its own, in order
of how much the later ones would miss them; what does not fit into --limit is listed as not run. FOLDER gets a log and a
JSON file of each, `summary.json`, and a picture of the scaling. With --smoke tiny sizes on CPUs. NVLink multicast
(NVLS) is left as the environment sets it.

Weak scaling: the same model and tokens a rank on 1, 2, 4, ... ranks; efficiency is tokens/s a rank over those of one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
FULL_LAYOUTS = "fsdp;ep tokens;ep 2 tokens;ep tokens, tp 2;ep"
BF16_LOSS_BOUND = 0.01
"""Relative: layouts add up in other orders, in bf16, for a few steps."""


@dataclass(frozen=True)
class Job:
    """One torchrun."""

    name: str
    ranks: int
    command: list[str]
    limit: float
    env: dict[str, str] = field(default_factory=dict)
    json: bool = True


def meshes(ranks: int) -> list[tuple[int, int, int]]:
    """(DP, SHARD, TP) with each axis alone, and with all of them where there are enough ranks."""
    found = [(ranks, 1, 1), (1, ranks, 1), (1, 1, 2)] if ranks == 2 else [(1, ranks // 2, 2), (2, ranks // 2, 1)]
    return [*found, (2, ranks // 4, 2)] if ranks >= 8 else found


def jobs(ranks: int, smoke: bool) -> list[Job]:
    """In order of importance. Sizes: an OLMoE layer and model, or tiny ones."""
    layer = ["--tokens", "16384", "--hidden-size", "2048", "--intermediate-size", "1024", "--num-experts", "64",
             "--top-k", "8", "--shared-size", "2048", "--rounds", "10", "--max-bytes", str(2**29)]  # fmt: skip
    model = ["--preset", "olmoe-1b-7b", "--steps", "6", "--warmup", "3"]
    layouts = ["--precision", "bf16", "--width", "1024", "--seq-len", "512", "--steps", "5"]
    if smoke:
        layer = ["--tokens", "64", "--rounds", "1", "--max-bytes", str(2**14)]
        model = ["--preset", "tiny-moe", "--seq-len", "32", "--device", "cpu", "--no-compile", "--steps", "2",
                 "--warmup", "1"]  # fmt: skip
        layouts = ["--precision", "bf16", "--width", "64", "--seq-len", "32", "--steps", "2"]
    counts = [n for n in (1, 2, 4, 8) if n <= ranks]
    # More steps: the first ones are slower while kernels are compiled for new shapes.
    scaled = [] if smoke else ["--layers", "4", "--steps", "16"]
    weak = [
        Job(f"weak-{n}", n, ["benchmarks/scaling.py", *model, *scaled, "--layouts", "fsdp;ep;ep tokens"], 100)
        for n in counts
    ]
    full = Job("full-model", ranks, ["benchmarks/scaling.py", *model, "--layouts", FULL_LAYOUTS, "--plan"], 220)
    exchange = Job("exchange", ranks, ["benchmarks/alltoall.py", *layer], 90)
    fewer = [Job(f"exchange-{n}", n, ["benchmarks/alltoall.py", *layer], 60) for n in counts if 1 < n < ranks]
    experiments = [
        Job(
            f"mesh-{'x'.join(map(str, mesh))}", ranks, ["test_mesh.py", "--verify"], 90,
            dict(zip(("DP", "SHARD", "TP"), map(str, mesh))) | ({"SMALL": "1"} if smoke else {}), json=False,
        )
        for mesh in meshes(ranks)
    ]  # fmt: skip
    experiments.append(Job("dmoe", ranks, ["test_dmoe.py"], 120, json=False))
    experiments.append(Job("all-to-all", ranks, ["test_all_to_all.py"], 60, json=False))
    compared = Job("layouts", ranks, ["benchmarks/parallel.py", *layouts], 180)
    # The full model needs the memory of many GPUs.
    large = [full] if ranks >= 4 or smoke else []
    return [exchange, *weak, *large, compared, *experiments, *fewer]


def run(job: Job, out: Path, limit: float) -> dict[str, Any]:
    """Start it and wait. Its output goes to a file of its name."""
    script = ROOT / ("moe_exp" if job.command[0].startswith("test_") else "") / job.command[0]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.ranks),
               str(script), *job.command[1:]]  # fmt: skip
    path = out / f"{job.name}.json"
    command += ["--json", str(path)] if job.json else []
    env = os.environ | job.env | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "ASSETS": str(out)}
    env.setdefault("OMP_NUM_THREADS", "1")
    start = time.monotonic()
    with (out / f"{job.name}.log").open("w") as log:
        # A group of its own: a job that is out of time is ended with all its ranks.
        process = subprocess.Popen(command, env=env, cwd=script.parent, stdout=log, stderr=log, start_new_session=True)
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its ranks
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
            code = f"not ended in {limit:.0f} s"
    result: dict[str, Any] = {"exit": code, "seconds": time.monotonic() - start, "ranks": job.ranks}
    if path.exists():
        result["result"] = json.loads(path.read_text())
    return result


def weak_scaling(results: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Layout -> ranks -> tokens a second a rank, over those of one rank."""
    rates: dict[str, dict[int, float]] = {}
    for name, entry in results.items():
        if name.startswith("weak-") and "result" in entry:
            for layout, row in entry["result"]["layouts"].items():
                if "tokens_per_second" in row:
                    rates.setdefault(layout, {})[entry["ranks"]] = row["tokens_per_second"] / entry["ranks"]
    alone = rates.get("fsdp", {}).get(1)
    return {layout: {n: rate / alone for n, rate in by.items()} for layout, by in rates.items()} if alone else {}


def loss_spread(results: dict[str, Any]) -> float | None:
    """The largest relative distance of a layout's last loss from that of one rank."""
    rows = results.get("layouts", {}).get("result", {}).get("rows")
    if not rows:
        return None
    alone = rows["one rank"]["loss"]
    return max(abs(row["loss"] - alone) / alone for row in rows.values())


def draw(scaling: dict[str, dict[int, float]], results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for layout, rates in scaling.items():
        left.plot(list(rates), [100 * rate for rate in rates.values()], marker="o", label=layout)
    left.set(xlabel="ranks", ylabel="% of one rank's tokens/s", title="weak scaling", ylim=(0, 110))
    for name, entry in results.items():
        if name.startswith("exchange") and "result" in entry:
            rows = entry["result"]["messages"]
            sizes, speeds = [r["bytes"] / 2**20 for r in rows], [r["bytes_per_second"] / 1e9 for r in rows]
            right.plot(sizes, speeds, marker="o", label=f"{entry['ranks']} ranks")
    right.set(xlabel="MiB a rank", ylabel="GB/s that leave a rank", title="all-to-all", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs, JSON and pictures")
    parser.add_argument("--ranks", type=int, help="all GPUs")
    parser.add_argument("--limit", type=float, default=560, help="seconds in all")
    parser.add_argument("--only", help="names of jobs to run, with commas between")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on CPUs")
    options = parser.parse_args(arguments)
    ranks = options.ranks or torch.cuda.device_count() or 2
    options.out.mkdir(parents=True, exist_ok=True)
    end, results = time.monotonic() + options.limit, {}
    for job in jobs(ranks, options.smoke):
        left = end - time.monotonic()
        if options.only and job.name not in options.only.split(","):
            continue
        if left < 20:
            results[job.name] = {"exit": "not run: no time left", "ranks": job.ranks}
        else:
            results[job.name] = run(job, options.out, min(job.limit, left))
        entry = results[job.name]
        print(f"{job.name:20} {job.ranks} ranks  exit {entry['exit']}  {entry.get('seconds', 0):.0f} s", flush=True)
        scaling, spread = weak_scaling(results), loss_spread(results)
        summary = {"jobs": results, "weak_scaling": scaling, "loss_spread": spread}
        (options.out / "summary.json").write_text(json.dumps(summary, indent=1))
    draw(scaling, results, options.out / "scaling.png")
    for layout, rates in scaling.items():
        print(f"weak scaling, {layout}: " + ", ".join(f"{n} ranks {rate:.1%}" for n, rate in rates.items()))
    if spread is not None:
        print(f"loss of layouts within {spread:.1e} of one rank (bound {BF16_LOSS_BOUND})")
    wrong = spread is not None and not spread <= BF16_LOSS_BOUND
    return 1 if wrong or any(entry["exit"] != 0 for entry in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
