"""A 3-D mesh (replicate x shard x tp), and a transformer that trains alike on every layout of it.

DP=1 SHARD=2 TP=1 torchrun --nproc_per_node=2 --master_addr=127.0.0.1 --master_port=29500 test_mesh.py [--verify]

Environment: DP, SHARD, TP (their product is the number of ranks; 1 each), EP (1; ranks of SHARD x TP that the experts
are spread over), USE_LOSS_PARALLEL (1), SMALL (0; 1 for a narrow model that a CPU trains in seconds), ASSETS (folder of
the pictures).
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from utils import init_distributed, print_by_rank, read_int, run
from utils_memory import count_memory, save_counts, trace_allocations

from dmoe.config import ModelConfig, MoEConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig, require
from dmoe.errors import RunError
from dmoe.parallel import ParallelMesh, build_mesh
from dmoe.train.engine import build_engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import StepResult, training_step

STEPS = 5
BATCH_SIZE = 8
VOCAB_SIZE = 50257  # odd: two tensor-parallel ranks get unequal parts
# Of every step, relative. Adam forgives a gradient of the wrong size; its norm does not, but shows rounding sooner.
TOLERANCES = {"loss": 1e-4, "grad_norm": 1e-3}


@dataclass(frozen=True)
class Layout:
    """What the environment asks for."""

    dp: int
    shard: int
    tp: int
    ep: int
    loss_parallel: bool
    small: bool

    @property
    def name(self) -> str:
        suffix = ("" if self.ep == 1 else f"_ep{self.ep}") + ("_loss_parallel" if self.splits_loss else "")
        return f"mesh_{self.dp}x{self.shard}x{self.tp}{suffix}{'_small' if self.small else ''}"

    @property
    def splits_loss(self) -> bool:
        return self.tp > 1 and self.loss_parallel

    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            dp_replicate=self.dp, dp_shard=self.shard, tp=self.tp, ep=self.ep, loss_parallel=self.loss_parallel
        )


def read_layout(world_size: int) -> Layout:
    """From the environment; ConfigError if it does not fit the number of ranks."""

    def number(name: str, default: int, low: int = 1, high: int = 2**31) -> int:
        return read_int(name, low, high) if os.environ.get(name) else default

    dp, shard, tp = (number(name, 1) for name in ("DP", "SHARD", "TP"))
    require(
        dp * shard * tp == world_size, "DP x SHARD x TP", f"{dp} x {shard} x {tp} = {dp * shard * tp}",
        f"the number of ranks, {world_size}",
    )  # fmt: skip
    flags = (bool(number(name, default, 0, 1)) for name, default in (("USE_LOSS_PARALLEL", 1), ("SMALL", 0)))
    return Layout(dp, shard, tp, number("EP", 1), *flags)


def run_config(layout: Layout) -> RunConfig:
    """Four blocks with experts, width 1024 or 64, in fp32 so that layouts can be compared."""
    width, head_dim, seq_len = (64, 16, 32) if layout.small else (1024, 64, 256)
    return RunConfig(
        model=ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=width,
            num_layers=4,
            num_heads=width // head_dim,
            num_kv_heads=width // head_dim,
            head_dim=head_dim,
            moe=MoEConfig(intermediate_size=width, num_experts=8, top_k=2),
        ),
        optim=OptimConfig(lr=1e-3, eps=1e-6),
        train=TrainConfig(
            steps=STEPS, batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE, seq_len=seq_len, precision="fp32"
        ),
        parallel=layout.parallel(),
    )


def show_mesh(layout: Layout, device: torch.device) -> DeviceMesh:
    """Print the mesh, its two submeshes, and which ranks each process shares them with."""
    sizes = (layout.dp, layout.shard, layout.tp)
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("replicate", "shard", "tp"))
    fsdp, tp = mesh["replicate", "shard"], mesh["tp"]
    if dist.get_rank() == 0:
        print(f"mesh {dict(zip(mesh.mesh_dim_names or (), mesh.shape))}, ranks {mesh.mesh.tolist()}")
    groups = {name: dist.get_process_group_ranks(mesh.get_group(name)) for name in ("replicate", "shard", "tp")}
    print_by_rank(
        f"rank {dist.get_rank()} at {mesh.get_coordinate()}: fsdp submesh {fsdp.mesh.tolist()} "
        f"(groups: replicate {groups['replicate']}, shard {groups['shard']}), "
        f"tp submesh {tp.mesh.tolist()} (group {groups['tp']})"
    )
    return mesh


def train(config: RunConfig, device: torch.device, mesh: ParallelMesh | None, name: str = "") -> list[StepResult]:
    """Loss and gradient norm of each step, over the batch of all ranks. With a `name`, save pictures of the memory."""
    engine = build_engine(config, device, mesh)
    optimizer = build_optimizer(engine.parts, config.optim)
    tokens = some_tokens()
    results = []
    for step in range(STEPS):
        starts = np.arange(BATCH_SIZE) * 500 + step * 100  # windows of all ranks; the engine takes this rank's
        batch = engine.batch(tokens, starts)
        if name and step == STEPS - 1:
            with trace_allocations(device, name), count_memory(engine, optimizer) as count:
                results.append(training_step(engine, optimizer, batch, config.optim))
            save_counts(count, name, step + 1, device)
        else:
            results.append(training_step(engine, optimizer, batch, config.optim))
    return results


def some_tokens() -> np.ndarray:
    """A text to learn in few steps: 100 words from the whole vocabulary, some of them frequent."""
    draw = np.random.default_rng(0)
    words = draw.choice(VOCAB_SIZE, 100, replace=False)
    words[0] = VOCAB_SIZE - 1
    return words[np.minimum(draw.geometric(0.1, 10_000), 100) - 1].astype(np.uint16)


def compare(results: list[StepResult], config: RunConfig, device: torch.device) -> None:
    """Compare with one process, which rank 0 computes while the others wait; RunError on all ranks."""
    worst = torch.zeros(len(TOLERANCES), device=device)
    if dist.get_rank() == 0:
        alone = train(config, device, None)
        errors = np.array([[relative_error(a, b, field) for field in TOLERANCES] for a, b in zip(results, alone)])
        for step, (ours, theirs, (loss, norm)) in enumerate(zip(results, alone, errors), start=1):
            print(
                f"step {step}: loss {ours.loss:.6f}, one process {theirs.loss:.6f}, relative difference {loss:.1e}"
                f"; of the gradient norm {norm:.1e}"
            )
        worst.copy_(torch.from_numpy(errors.max(axis=0)))  # NaN stays
    dist.broadcast(worst, src=0)
    for (field, tolerance), error in zip(TOLERANCES.items(), worst.tolist()):
        if not error <= tolerance:
            raise RunError(f"{field} differs from one process by {error:.1e}: must be at most {tolerance:.0e}")
    if dist.get_rank() == 0:
        bounds = " and ".join(f"{field} within {tolerance:.0e}" for field, tolerance in TOLERANCES.items())
        print(f"verified: {bounds} of one process at every step", flush=True)


def relative_error(ours: StepResult, theirs: StepResult, field: str) -> float:
    return abs(getattr(ours, field) - getattr(theirs, field)) / getattr(theirs, field)


def run_layout(layout: Layout, device: torch.device, *, verify: bool) -> None:
    """Show the mesh, train, and with `verify` compare with a run of one process on rank 0."""
    config = run_config(layout)
    axes = show_mesh(layout, device)
    mesh = build_mesh(config.parallel, device_type=device.type)
    assert torch.equal(mesh.dense.mesh.flatten(), axes.mesh.flatten())  # the library lays the ranks out alike
    results = train(config, device, mesh, layout.name)
    if dist.get_rank() == 0 and layout.tp > 1:
        size = -(-VOCAB_SIZE // layout.tp)
        parts = [max(0, min(size, VOCAB_SIZE - size * i)) for i in range(layout.tp)]
        logits = "stay split over tp" if layout.loss_parallel else "assembled on every rank"
        print(f"vocabulary {VOCAB_SIZE} over tp in parts of {parts}, logits {logits}")
    if verify:
        compare(results, config, device)
    elif dist.get_rank() == 0:
        print("\n".join(f"step {step}: loss {r.loss:.6f}" for step, r in enumerate(results, start=1)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="A 3-D mesh and a transformer trained on it.")
    parser.add_argument("--verify", action="store_true", help="compare every loss with a run of one process")
    options = parser.parse_args()
    _, world_size, device = init_distributed()
    run_layout(read_layout(world_size), device, verify=options.verify)


if __name__ == "__main__":
    run(main)
