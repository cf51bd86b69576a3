"""What watching for hangs costs: steps with and without the watch in turns, in one run of gloo ranks.

    python benchmarks/hang_overhead.py [--ranks 2] [--blocks 20] [--steps 10]

Prints the median step of both, their ratio, how often a step calls what is recorded, and what one such call costs. The
flight recorder of torch is on in both, as it is without this package: `--flight-recorder` runs the ranks once with it
and once without, in processes of their own, where the noise between two starts is part of the ratio.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing

from dmoe.config import ModelConfig, MoEConfig, ParallelConfig, ProfilingConfig, RunConfig, TrainConfig
from dmoe.observe.hang import HangWatch
from dmoe.observe.hang.collectives import recorded_collectives
from dmoe.ops.collectives import leave_process_group
from dmoe.ops.regions import listening, region
from dmoe.parallel import build_mesh
from dmoe.train.engine import build_engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=20, help="blocks of steps, every second one watched")
    parser.add_argument("--steps", type=int, default=10, help="steps in a block")
    parser.add_argument("--flight-recorder", action="store_true", help="also compare torch's recorder on and off")
    options = parser.parse_args()
    for size in ("2000", "0") if options.flight_recorder else ("2000",):
        os.environ["TORCH_FR_BUFFER_SIZE"] = size
        print(f"flight recorder: {size} entries")
        with tempfile.TemporaryDirectory() as folder:
            args = (options.ranks, options.blocks, options.steps, folder)
            torch.multiprocessing.spawn(rank_main, args, nprocs=options.ranks)


def run_config() -> RunConfig:
    moe = MoEConfig(num_experts=8, top_k=2, intermediate_size=128)
    model = ModelConfig(
        vocab_size=512,
        hidden_size=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        max_seq_len=128,
        moe=moe,
    )
    train = TrainConfig(batch_size=8, micro_batch_size=4, seq_len=64, precision="fp32", device="cpu")
    data = replace(RunConfig().data, tokenizer="bytes")
    return RunConfig(model=model, train=train, data=data, parallel=ParallelConfig(ep=2))


def rank_main(rank: int, ranks: int, blocks: int, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    config = run_config()
    engine = build_engine(config, torch.device("cpu"), build_mesh(config.parallel))
    optimizer = build_optimizer(engine.parts, config.optim)
    tokens = np.random.default_rng(0).integers(0, 512, 4000).astype(np.uint16)
    batch = engine.batch(tokens, np.arange(config.train.batch_size) * 100)

    def block(watch: HangWatch, count: int) -> list[tuple[float, float]]:
        seconds = []
        with watch:
            for step in range(count):
                start, start_cpu = time.perf_counter(), time.process_time()
                watch.begin(step + 1)
                training_step(engine, optimizer, batch, config.optim)
                watch.end(step + 1)
                seconds.append((time.perf_counter() - start, time.process_time() - start_cpu))
        return seconds

    on, off = ProfilingConfig(hang_timeout=300.0), ProfilingConfig(hang_timeout=0.0)
    block(HangWatch(off, Path(folder)), steps)
    times: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for i in range(blocks):
        times[i % 2 == 0] += block(HangWatch(on if i % 2 == 0 else off, Path(folder)), steps)
    medians = {on: [statistics.median(values) for values in zip(*times[on])] for on in times}
    plain = medians[False][0]
    regions = count_regions(lambda: training_step(engine, optimizer, batch, config.optim))
    if rank == 0:
        for name, without, watched in zip(("time", "CPU time"), medians[False], medians[True]):
            print(f"  {name} of a step {without * 1e3:.2f} ms, watched {watched * 1e3:.2f} ms: {watched / without:.4f}")
        cost = region_seconds(Path(folder), on)
        print(f"  {regions} regions a step at {cost * 1e6:.2f} us more: {regions * cost / plain:.4%} of a step")
        start = time.perf_counter()
        number = len(recorded_collectives())
        print(f"  reading {number} collectives, when a rank writes: {(time.perf_counter() - start) * 1e3:.0f} ms")
    leave_process_group()


def count_regions(function: object) -> int:
    """Regions that a call of `function` goes through."""

    class Counter:
        regions = 0

        def enter(self, name: str) -> None:
            self.regions += 1

        def leave(self, name: str) -> None:
            pass

    counter = Counter()
    with listening(counter):
        function()  # type: ignore[operator]
    return counter.regions


def region_seconds(folder: Path, profiling: ProfilingConfig, calls: int = 20000) -> float:
    """What a region costs more while it is watched."""

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            with region("experts"):
                pass
        return (time.perf_counter() - start) / calls

    plain = seconds()
    with HangWatch(profiling, folder):
        return seconds() - plain


if __name__ == "__main__":
    main()
