"""Time an optimiser step under each layout that fits a number of ranks.

    python benchmarks/parallel.py --ranks 4                   # starts the ranks itself, over loopback
    torchrun --nproc-per-node 8 benchmarks/parallel.py        # NCCL where there is a GPU for each rank, else gloo

Every layout trains the same model on the same global batch; the loss after the last step is printed beside the time,
and must agree. The table gives the median step of the slowest rank, tokens per second, and the speed relative to one
rank alone. `--json FILE` writes it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from numpy.typing import NDArray

from dmoe.cli.bench import machine
from dmoe.config import ModelConfig, MoEConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from dmoe.errors import ConfigError
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import build_mesh, check_model, resolve
from dmoe.train.device import rank_device
from dmoe.train.engine import build_engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step

OPTIM = OptimConfig(lr=3e-4)
"""Without a warm-up, larger steps make a wide model's loss jump, and every rounding with it."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"dp_replicate": -1},
    "fsdp": {},
    "fsdp, ep 2": {"ep": 2},
    "ep over all": {"ep": -1},
    "hsdp 2 x n/2": {"dp_replicate": 2},
    "tp 2": {"tp": 2},
    "tp 2, ep 2": {"tp": 2, "ep": 2},
    "cp 2": {"cp": 2},
    "pp 2, 1f1b": {"pp": 2},
    "pp 2, interleaved": {"pp": 2, "schedule": "interleaved_1f1b"},
    "pp 2, ep 2": {"pp": 2, "ep": 2},
}


def run_config(options: argparse.Namespace) -> RunConfig:
    model = ModelConfig(
        hidden_size=options.width, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=options.width // 8,
        moe=MoEConfig(num_experts=8, top_k=2, intermediate_size=options.width),
    )  # fmt: skip
    train = TrainConfig(
        batch_size=options.batch, micro_batch_size=options.batch // 4, seq_len=options.seq_len, seed=0,
        steps=options.steps, precision=options.precision,
    )  # fmt: skip
    return RunConfig(model=model, train=train)


def layouts(world_size: int, config: RunConfig) -> dict[str, ParallelConfig]:
    """Those that fit the ranks; -1 stands for all of them."""
    fitting = {}
    for name, axes in LAYOUTS.items():
        sizes: dict[str, Any] = {axis: world_size if size == -1 else size for axis, size in axes.items()}
        try:
            layout = resolve(ParallelConfig(**sizes), world_size)
            check_model(layout, config.model, config.train)
        except ConfigError:
            continue
        if name.startswith("hsdp") and layout.dp_shard == 1:  # that is dp
            continue
        fitting[name] = layout
    return fitting


def text() -> NDArray[np.uint16]:
    """Bytes of Python's standard library. On random tokens the loss would wander, and every rounding with it."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return np.frombuffer(b"".join(f.read_bytes() for f in files)[:1_000_000], np.uint8).astype(np.uint16)


def measure(config: RunConfig, layout: ParallelConfig | None, device: torch.device) -> dict[str, Any]:
    """Median seconds of a step on the slowest rank, and the last loss."""
    mesh = None if layout is None else build_mesh(layout, device_type=device.type)
    engine = build_engine(config, device, mesh)
    optimizer = build_optimizer(engine.parts, OPTIM)
    tokens = text()
    draw, times = np.random.default_rng(1), []
    for _ in range(config.train.steps + 2):  # two to warm up
        starts = draw.integers(0, len(tokens) - config.train.seq_len - 1, config.train.batch_size)
        batch = engine.batch(tokens, starts)
        start = time.perf_counter()
        result = training_step(engine, optimizer, batch, OPTIM)  # ends with a reduction over all ranks
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(times[2:], dtype=torch.float64, device=device)
    if mesh is not None:
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return {"seconds": statistics.median(slowest.tolist()), "loss": result.loss}


def rank_main(rank: int, world_size: int, options: argparse.Namespace, store: str | None) -> None:
    torch.set_num_threads(1)
    device = rank_device("auto" if torch.cuda.device_count() >= world_size else "cpu", rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if store is not None:
        dist.init_process_group(backend, store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend)
    config = run_config(options)
    rows: dict[str, dict[str, Any]] = {}
    if rank == 0:
        rows["one rank"] = measure(config, None, device)
    dist.barrier()
    for name, layout in layouts(world_size, config).items():
        rows[name] = measure(config, layout, device)
        gc.collect()
    if rank == 0:
        report(rows, world_size, backend, config, device, options.json)
    dist.barrier()
    leave_process_group()


def report(
    rows: dict[str, dict[str, Any]], world_size: int, backend: str, config: RunConfig, device: torch.device,
    json_path: str | None,
) -> None:  # fmt: skip
    tokens = config.train.batch_size * config.train.seq_len
    title = f"{machine(device)['device']}; {world_size} ranks, {backend}; "
    title += f"{tokens} tokens a step, {config.train.precision}"
    print(f"{title}\n{'layout':<20}{'ms a step':>11}{'tokens/s':>11}{'of one rank':>13}{'last loss':>11}")
    for name, row in rows.items():
        row |= {"tokens_per_second": tokens / row["seconds"], "ratio": rows["one rank"]["seconds"] / row["seconds"]}
        print(
            f"{name:<20}{row['seconds'] * 1e3:>11.1f}{row['tokens_per_second']:>11.0f}{row['ratio']:>13.2f}"
            f"{row['loss']:>11.5f}"
        )
    if json_path:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(json_path + ".tmp")
        temporary.write_text(json.dumps({"title": title, "rows": rows}, indent=1))
        os.replace(temporary, json_path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time an optimiser step under each layout.")
    parser.add_argument("--ranks", type=int, default=2, help="ranks to start; torchrun's number counts under torchrun")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--json", default=None, help="also write the table to this file")
    options = parser.parse_args()
    if "RANK" in os.environ:
        rank_main(int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]), options, None)
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        args = (options.ranks, options, f"{folder}/store")
        torch.multiprocessing.spawn(rank_main, args, nprocs=options.ranks)


if __name__ == "__main__":
    main()
