"""Train a large model under several layouts of the GPUs at hand: step time, MFU, memory, and what the plan said.

    torchrun --nproc-per-node 8 benchmarks/scaling.py                      # OLMoE-1B-7B in full
    torchrun --nproc-per-node 2 benchmarks/scaling.py --layers 4 --layouts "fsdp;ep"

Each rank has as many sequences whatever the number of ranks, so that runs of the same model with 1, 2, 4 and 8 of them
show how it scales. A step is forward, backward, clipping and AdamW of random tokens, bf16 under fp32 weights unless
--precision says otherwise. MFU counts active parameters (`Decoder.flops_per_token`). "planned" is the peak memory
that `dmoe train --dry-run` foretells, and "sent" the bytes that it says a rank sends in a step; among the layouts that
fit, the one that sends least is the one to expect most of. A layout that fails has its error in its row.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from dmoe.bench.measure import attempt
from dmoe.cli.bench import machine
from dmoe.config import OptimConfig, ParallelConfig, RunConfig, TrainConfig
from dmoe.errors import ConfigError
from dmoe.models import count_parameters, get_preset
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import build_mesh, check_model, resolve
from dmoe.train.device import _PEAK_BF16, rank_device
from dmoe.train.engine import build_engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "ep": {"ep": -1},
    "ep tokens": {"ep": -1, "ep_sends": "tokens"},
    "ep 2 tokens": {"ep": 2, "ep_sends": "tokens"},
    "ep 2": {"ep": 2},
    "ep 4": {"ep": 4},
    "tp 2": {"tp": 2},
    "ep, tp 2": {"ep": -1, "tp": 2},
    "ep tokens, tp 2": {"ep": -1, "tp": 2, "ep_sends": "tokens"},
}
"""By name: fields of `parallel`; a degree of -1 is all ranks. What is not said is left to FSDP."""


def run_config(
    options: argparse.Namespace, world_size: int, layout: ParallelConfig, *, compile: bool = False
) -> RunConfig:
    model = get_preset(options.preset)
    model = replace(model, num_layers=options.layers or model.num_layers)
    batch = options.sequences * world_size
    train = TrainConfig(
        batch_size=batch, micro_batch_size=batch, seq_len=options.seq_len, precision=options.precision,
        compile=compile, activation_checkpointing=options.checkpointing, device=options.device,
    )  # fmt: skip
    return RunConfig(model=model, train=train, parallel=layout)


def fitting_layouts(options: argparse.Namespace, world_size: int) -> dict[str, RunConfig]:
    """Those asked for that this number of ranks allows, without repetitions; compiled where that can be."""
    found: dict[str, RunConfig] = {}
    for name in options.layouts.split(";"):
        if name not in LAYOUTS:
            raise ConfigError(f"--layouts has {name!r}: must be of {'; '.join(LAYOUTS)}")
        sizes: dict[str, Any] = {a: world_size if n == -1 else n for a, n in LAYOUTS[name].items()}
        for compile in (True, False) if options.compile else (False,):
            try:
                layout = resolve(ParallelConfig(**sizes), world_size)
                config = run_config(options, world_size, layout, compile=compile)
                check_model(layout, config.model, config.train)
            except ConfigError as error:
                if os.environ["RANK"] == "0":
                    print(f"{name}, {'compiled' if compile else 'eager'}: left out: {error}", flush=True)
                continue
            if all(layout != other.parallel for other in found.values()):
                found[name] = config
            break
    return found


def measure(options: argparse.Namespace, config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step on the slowest rank, the most memory of any, and the last loss."""
    engine = build_engine(config, device, build_mesh(config.parallel, device_type=device.type))
    optimizer = build_optimizer(engine.parts, OptimConfig(lr=1e-4))
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 200_000).astype(np.uint16)
    draw, times = np.random.default_rng(1), []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(options.warmup + options.steps):
        starts = draw.integers(0, len(tokens) - config.train.seq_len - 1, config.train.batch_size)
        batch = engine.batch(tokens, starts)
        start = time.perf_counter()
        result = training_step(engine, optimizer, batch, OptimConfig())  # ends with a reduction over all ranks
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    worst = torch.tensor([*times[options.warmup :], peak], dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    *slowest, peak = worst.tolist()
    measured = {"seconds": statistics.median(slowest), "peak_bytes": peak, "loss": result.loss}
    return measured | {"compiled": config.train.compile}


def complete(row: dict[str, Any], options: argparse.Namespace, device: torch.device) -> None:
    """Rates of a measured row."""
    world_size = dist.get_world_size()
    tokens = options.sequences * options.seq_len * world_size
    model = run_config(options, world_size, ParallelConfig()).model
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((tflops for card, tflops in _PEAK_BF16.items() if card in name), None)
    flops = count_parameters(model, options.seq_len)["flops_per_token"]
    row["tokens_per_second"] = tokens / row["seconds"]
    row["mfu"] = row["tokens_per_second"] * flops / world_size / (peak * 1e12) if peak else None


def planned(config: RunConfig, world_size: int) -> dict[str, Any]:
    """What a dry run says of the same run."""
    from dmoe.train.plan import plan

    ranks, problem = attempt(lambda: plan(config, world_size).ranks)
    if problem:
        return {"problem": problem}
    return {"peak_bytes": max(r.total for r in ranks), "sent_bytes": max(sum(r.sent.values()) for r in ranks)}


def report(report: dict[str, Any]) -> None:
    where, settings = report["machine"], report["settings"]
    print(f"{where['device']}, torch {where['torch']}; {report['ranks']} ranks")
    size = f"{settings['sequences']} x {settings['seq_len']} tokens a rank"
    print(f"{settings['preset']}, {report['layers']} layers, {size}")
    rates = f"{'ms':>9}{'tokens/s':>11}{'MFU':>8}"
    print(f"{'layout':16}{rates}{'peak GiB':>10}{'planned':>9}{'sent GiB':>10}{'loss':>10}")
    for name, row in report["layouts"].items():
        if "problem" in row:
            print(f"{name:16}  {row['problem']}")
            continue
        plan = row.get("planned", {})
        gib = [f"{plan[key] / 2**30:.1f}" if key in plan else "-" for key in ("peak_bytes", "sent_bytes")]
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        print(
            f"{name:16}{row['seconds'] * 1e3:>9.1f}{row['tokens_per_second']:>11,.0f}{mfu:>8}"
            f"{row['peak_bytes'] / 2**30:>10.1f}{gib[0]:>9}{gib[1]:>10}{row['loss']:>10.4f}"
            f"{'' if row['compiled'] else '  eager'}"
        )


def run(options: argparse.Namespace) -> None:
    """One rank."""
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = rank_device(options.device, local_rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rows: dict[str, dict[str, Any]] = {}
    configs = fitting_layouts(options, world_size)
    for name, config in configs.items():
        row, problem = attempt(lambda: measure(options, config, device))  # noqa: B023 (called at once)
        rows[name] = row if problem is None else {"problem": problem}
        if problem is None:
            complete(row, options, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if problem:  # the other ranks may be inside a collective that this one has left
            break
    result = {
        "machine": machine(device), "ranks": world_size, "settings": vars(options) | {"json": str(options.json)},
        "layers": run_config(options, world_size, ParallelConfig()).model.num_layers, "layouts": rows,
    }  # fmt: skip
    if rank == 0:
        if options.plan:
            for name, config in configs.items():
                rows.setdefault(name, {"problem": "not run"})["planned"] = planned(config, world_size)
        report(result)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1))
    if any("problem" in row for row in rows.values()):
        os._exit(1)
    dist.barrier()
    leave_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="olmoe-1b-7b")
    add("--layers", type=int, default=0, help="instead of all that the preset has")
    add("--layouts", default="fsdp;ep;ep tokens;ep tokens, tp 2", help=f"of {'; '.join(LAYOUTS)}")
    add("--sequences", type=int, default=4, help="of a rank")
    add("--seq-len", type=int, default=4096)
    add("--steps", type=int, default=8)
    add("--warmup", type=int, default=3)
    add("--precision", default="auto", help="of the step, as in train.precision")
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--checkpointing", action="store_true", help="recompute activations")
    add("--plan", action="store_true", help="also plan each layout")
    add("--device", default="auto", help='"auto" or "cpu"')
    add("--json", type=Path, help="write the numbers there")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
