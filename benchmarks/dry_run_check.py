"""Hold the plan of `dmoe train --dry-run` against real runs.

    python benchmarks/dry_run_check.py [--ranks 4] [--json FILE]      processes of this machine, over gloo
    python benchmarks/dry_run_check.py --device cuda [--json FILE]    one GPU, several models

On the CPU, for each layout: bytes of weights, gradients, optimiser state, activations that a forward saves and bytes
sent in a step; the peak by the account of `dmoe.observe.memory`; and by how much the process grew. On a GPU: the peak
of the allocator (torch.cuda.max_memory_allocated) and, in a further step, the account of what it consists of.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from dmoe.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig, TrainConfig
from dmoe.moe.sharded import local
from dmoe.observe.memory.account import Account, account_of, following_step
from dmoe.observe.memory.accounting import MemoryTimeline
from dmoe.observe.memory.operators import operators_to_look_into
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import build_mesh
from dmoe.parallel.fsdp import fsdp_modules
from dmoe.parallel.traffic import TrafficCounter
from dmoe.train.engine import Batch, Engine, build_engine
from dmoe.train.optim import build_optimizer
from dmoe.train.plan import RankPlan, logits_width, plan
from dmoe.train.step import training_step

LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp 4": {"dp_shard": 4},
    "fsdp 2 x ep 2": {"dp_shard": 4, "ep": 2},
    "tp 2 x fsdp 2": {"tp": 2, "dp_shard": 2},
    "pp 2 x fsdp 2": {"pp": 2, "dp_shard": 2},
}

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=8192, hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64,
        intermediate_size=1024, moe=MoEConfig(intermediate_size=512, num_experts=16, top_k=2, aux_loss_coef=1.0),
        tie_embeddings=False, max_seq_len=1024,
    ),
    train=TrainConfig(batch_size=8, micro_batch_size=4, seq_len=512, device="cpu", precision="fp32"),
)  # fmt: skip

# What is trained on one GPU: a tiny model, and four layers as wide as OLMoE's (64 experts of 1024, 8 a token).
CUDA_MODELS = {
    "tiny": ModelConfig(
        vocab_size=8192, hidden_size=512, num_layers=4, num_heads=8, num_kv_heads=4, head_dim=64,
        moe=MoEConfig(intermediate_size=512, num_experts=16, top_k=2), tie_embeddings=False, max_seq_len=4096,
    ),
    "olmoe, 4 layers": ModelConfig(
        vocab_size=50304, hidden_size=2048, num_layers=4, num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="full",
        moe=MoEConfig(intermediate_size=1024, num_experts=64, top_k=8), tie_embeddings=False, max_seq_len=4096,
    ),
}  # fmt: skip
CUDA_SEQ_LEN = 2048


def storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each different storage behind some tensors."""
    locals_ = [local(t.detach()) for t in tensors]
    # What a functional collective returns is a wrapper without memory of its own.
    found = [getattr(t, "elem", t).untyped_storage() for t in locals_]
    return {s.data_ptr(): s.nbytes() for s in found if s.nbytes()}


def warm_up(config: RunConfig) -> None:
    """A step of a tiny model, so that code which is loaded at first use is not counted as growth."""
    model = replace(config.model, hidden_size=64, num_layers=2)
    measure(replace(config, model=model, train=replace(config.train, seq_len=32)))


def account_for_step(engine: Engine, optimizer: torch.optim.Optimizer, batch: Batch, config: RunConfig) -> Account:
    """The account of one training step; not a first one, which makes the optimiser's state."""
    timeline = MemoryTimeline(
        device=engine.device.type, logits_width=logits_width(config.model.vocab_size, engine.mesh),
        expand=operators_to_look_into(engine.device), rounding=512 if engine.device.type == "cuda" else 1,
    )  # fmt: skip
    with timeline, following_step(timeline, engine.parameters, optimizer):
        training_step(engine, optimizer, batch, config.optim)
    return account_of(timeline)


def measure(config: RunConfig) -> dict[str, Any]:
    """What this rank holds, saves, sends and grows by in training steps."""
    before = _memory("VmRSS")
    mesh = build_mesh(config.parallel)
    engine = build_engine(config, torch.device("cpu"), mesh)
    optimizer = build_optimizer(engine.parts, config.optim)
    sizes: dict[str, Any] = {}
    gradients: list[Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad for p in engine.parameters if p.grad is not None)
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    with TrafficCounter(mesh) as counter:
        training_step(engine, optimizer, _batch(config, mesh, 0), config.optim)
    sizes["gradients"] = sum(storages(gradients).values())
    gradients.clear()
    sizes["sent"] = dict(counter.sent)
    training_step(engine, optimizer, _batch(config, mesh, 1), config.optim)
    gradients.clear()
    sizes["growth"] = _memory("VmHWM") - before
    sizes["weights"] = sum(storages(engine.parameters).values())
    sizes["optimizer state"] = sum(storages([t for s in optimizer.state.values() for t in s.values()]).values())
    sizes["parameters"] = sum(local(p).numel() for p in engine.parameters)
    sizes["activations"] = saved_by_forward(engine, _batch(config, mesh, 0))
    optimizer.zero_grad()
    optimizer._optimizer_step_pre_hooks.clear()
    account = account_for_step(engine, optimizer, _batch(config, mesh, 2), config)
    sizes["peak"], sizes["phases"] = account.categories, account.phases
    return sizes


def saved_by_forward(engine: Engine, batch: Batch) -> int:
    """Bytes of what autograd saves in the forward of one micro-batch, weights left out."""
    size = batch.inputs.shape[0] // engine.num_micro_batches
    inputs, targets = batch.inputs[:size], batch.targets[:size]
    total = 0
    for part in engine.parts:
        saved: list[Tensor] = []
        x = inputs
        if not part.is_first:
            assert engine.pipeline is not None
            outline = next(o for p, o in engine.pipeline.part_of_stage.values() if p is part)
            x = torch.randn(outline.shape, dtype=outline.dtype, requires_grad=True)

        def pack(tensor: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = part(x)
            loss = engine.loss(out, targets) if part.is_last else out.sum()
        found = storages(saved)
        for pointer in _weight_storages(part):
            found.pop(pointer, None)
        total += sum(found.values())
        loss.backward()
    return total


def _weight_storages(part: torch.nn.Module) -> set[int]:
    weights = [local(p.detach()) for p in part.parameters()]
    for module in fsdp_modules(part):
        group = module._get_fsdp_state()._fsdp_param_group
        for parameter in group.fsdp_params if group is not None else []:
            weights += [*parameter.all_gather_outputs, parameter._sharded_param_data]
    return {t.untyped_storage().data_ptr() for t in weights}


def _batch(config: RunConfig, mesh: Any, seed: int, device: str = "cpu") -> Batch:
    dp_size, cp, dp_rank = (1, 1, 0) if mesh is None else (mesh.dp_size, mesh.config.cp, mesh.dp_rank)
    shape = (config.train.batch_size // dp_size, config.train.seq_len // cp)
    # Ranks that work on the same tokens must draw the same.
    generator = torch.Generator().manual_seed(seed * 1000 + dp_rank)
    ids = torch.randint(config.model.vocab_size, shape, generator=generator).to(device)
    return Batch(ids, ids.roll(-1, 1))


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def rank_main(rank: int, world: int, folder: str, configs: dict[str, RunConfig]) -> None:
    """A process of a real run; one file of results for each layout."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    for i, (name, config) in enumerate(configs.items()):
        if len(configs) == 1:  # growth is of interest
            warm_up(config)
        Path(f"{folder}/{i}-{rank}.json").write_text(json.dumps({"layout": name, **measure(config)}))
    leave_process_group()


def run_for_real(configs: dict[str, RunConfig], world: int, *, fresh: bool = False) -> dict[str, list[dict[str, Any]]]:
    """Results of every rank of every layout. `fresh`: new processes for each, so that growth can be compared."""
    results: dict[str, list[dict[str, Any]]] = {}
    for chosen in [{n: c} for n, c in configs.items()] if fresh else [configs]:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(rank_main, (world, folder, chosen), nprocs=world)
            for i, name in enumerate(chosen):
                results[name] = [json.loads(Path(f"{folder}/{i}-{r}.json").read_text()) for r in range(world)]
    return results


def differences(planned: RankPlan, real: dict[str, Any]) -> list[tuple[str, float, float]]:
    """(what, planned, measured)."""
    kept = planned.activations["kept"]
    rows: list[tuple[str, float, float]] = [
        (name, planned.peak[name], real[name]) for name in ("weights", "optimizer state")
    ]
    rows += [("gradients", planned.largest["gradients"], real["gradients"])]
    rows += [("parameters", sum(planned.parameters.values()), real["parameters"])]
    rows += [("activations", kept, real["activations"])]
    for name in sorted({*planned.sent, *real["sent"]}):
        rows.append((f"sent, {name}", planned.sent.get(name, 0), real["sent"].get(name, 0)))
    return [*rows, ("peak", planned.total, sum(real["peak"].values()))]


def check_cpu(ranks: int) -> list[dict[str, Any]]:
    """Print planned and measured for each layout; a dict for each rank of a plan."""
    # Blocks of this size and more go back to the system when freed, so that growth is what lives at once.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    configs = {name: replace(CONFIG, parallel=ParallelConfig(**layout)) for name, layout in LAYOUTS.items()}
    real = run_for_real(configs, ranks, fresh=True)
    found = []
    for name, config in configs.items():
        print(f"\n{name}\n{'':48}{'planned MiB':>14}{'measured MiB':>14}{'':>8}")
        for planned in plan(config, ranks).ranks:
            measured = real[name][planned.rank]
            rows = differences(planned, measured)
            rows += [(f"at the peak, {c}", planned.peak[c], measured["peak"][c]) for c in planned.peak]
            rows.append(("growth of the process", planned.total, measured["growth"]))
            _print_rows(f"rank {planned.rank}: ", rows)
            found.append({"layout": name, "rank": planned.rank, "rows": rows})
    return found


def _print_rows(title: str, rows: list[tuple[str, float, float]]) -> None:
    for what, ours, theirs in rows:
        if ours or theirs:
            off = f"{ours / theirs - 1:+.1%}" if theirs else ""
            print(f"{title}{what:40} {ours / 2**20:14.2f}{theirs / 2**20:14.2f}{off:>8}", flush=True)


def check_cuda() -> list[dict[str, Any]]:
    """Each model with 1 and 4 sequences a micro-batch, with and without checkpointing. What fails is said and left."""
    found = []
    for model in CUDA_MODELS:
        for micro_batch in (1, 4):
            for checkpointing in (False, True):
                case = {"model": model, "micro_batch_size": micro_batch, "activation_checkpointing": checkpointing}
                try:
                    found.append(case | _check_cuda_case(_cuda_config(case)))
                    _print_case(found[-1])
                except Exception as error:  # the next case may work, and this runs once
                    print(f"{case}: {type(error).__name__}: {error}", flush=True)
                    found.append(case | {"error": f"{type(error).__name__}: {error}"})
                gc.collect()  # of engines, which are cycles
                torch.cuda.empty_cache()
    return found


def _cuda_config(case: dict[str, Any]) -> RunConfig:
    size = case["micro_batch_size"]
    train = TrainConfig(
        batch_size=size * 2, micro_batch_size=size, seq_len=CUDA_SEQ_LEN, device="cuda", precision="bf16",
        activation_checkpointing=case["activation_checkpointing"], compile=False,
    )  # fmt: skip
    return RunConfig(model=CUDA_MODELS[case["model"]], train=train)


def _check_cuda_case(config: RunConfig) -> dict[str, Any]:
    planned = plan(config, 1).ranks[0]
    device = torch.device("cuda", torch.cuda.current_device())
    outside = torch.cuda.memory_allocated(device) - _clear_workspaces(device)  # of what ran before
    engine = build_engine(config, device)
    optimizer = build_optimizer(engine.parts, config.optim)
    for step in range(2):
        training_step(engine, optimizer, _batch(config, None, step, "cuda"), config.optim)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    training_step(engine, optimizer, _batch(config, None, 2, "cuda"), config.optim)
    torch.cuda.synchronize(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    account = account_for_step(engine, optimizer, _batch(config, None, 3, "cuda"), config)
    torch.cuda.synchronize(device)
    workspaces = _clear_workspaces(device)
    measured = account.categories | {"workspaces of kernels": workspaces}
    return {
        "device": torch.cuda.get_device_name(device), "torch": torch.__version__,
        "planned": planned.total, "max_memory_allocated": peak - outside, "max_memory_reserved": reserved,
        "difference": planned.total / (peak - outside) - 1, "accounted": sum(measured.values()),
        "unaccounted": peak - outside - sum(measured.values()),
        "planned_categories": planned.peak, "measured_categories": measured, "measured_phases": account.phases,
    }  # fmt: skip


def _clear_workspaces(device: torch.device) -> int:
    """Free cuBLAS's workspaces; how large they were."""
    before = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated(device)


def _print_case(case: dict[str, Any]) -> None:
    name = f"{case['model']}, micro-batch {case['micro_batch_size']}, "
    name += "checkpointing" if case["activation_checkpointing"] else "no checkpointing"
    print(f"\n{name}\n{'':40} {'planned MiB':>14}{'measured MiB':>14}")
    planned, measured = case["planned_categories"], case["measured_categories"]
    rows: list[tuple[str, float, float]] = [(c, planned[c], measured[c]) for c in planned]
    rows += [("unaccounted", 0, case["unaccounted"])]
    _print_rows("", [*rows, ("peak, max_memory_allocated", case["planned"], case["max_memory_allocated"])])


def main() -> int:
    """Print planned and measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write the numbers there, in bytes")
    options = parser.parse_args()
    found = check_cuda() if options.device == "cuda" else check_cpu(options.ranks)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
