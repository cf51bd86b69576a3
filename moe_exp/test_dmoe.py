"""A dropless MoE layer under data parallel x expert parallel against the plain layer on one process.

torchrun --nproc_per_node=2 --master_addr=127.0.0.1 --master_port=29500 test_dmoe.py

Every rank trains the spread layer on its share of a batch for a step, and the plain layer on all of it; outputs before
and after the step, gradients and updated weights must agree. In bf16 the spread layer takes over the plain one's choice
of experts: a rounding decides between two that are nearly as good. A line a case; exit code 1 if one fails.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from utils import init_distributed, run

from dmoe.config import MoEConfig, ParallelConfig
from dmoe.errors import RunError
from dmoe.moe import MoE
from dmoe.moe.replay import RoutingTrace, record_routing, replay_routing
from dmoe.moe.sharded import local
from dmoe.parallel import ParallelMesh, build_mesh
from dmoe.parallel.expert import apply_expert_parallel

WIDTH, SEQ_LEN = 32, 16
LEARNING_RATE = 0.1
# Of the largest absolute value. bf16 has 8 bits, and a gradient that ranks add up is rounded once on each.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Case(NamedTuple):
    """One line of the table."""

    kind: str
    """mlp: plain experts; glu: gated ones."""
    num_experts: int
    ep: int
    dims: int
    """Of the input: [T, D] or [B, S, D]."""
    dtype: torch.dtype

    @property
    def can_spread(self) -> bool:
        return self.num_experts % self.ep == 0


def all_cases(world_size: int) -> list[Case]:
    sizes = dict.fromkeys((1, 2, world_size))  # 2 of 4 ranks: experts spread and copied at once
    spreads = [size for size in sizes if world_size % size == 0]
    return [Case(*values) for values in itertools.product(("mlp", "glu"), (1, 8), spreads, (2, 3), BOUNDS)]


def build_layer(case: Case, device: torch.device) -> MoE:
    """With the same weights on every rank."""
    gated = case.kind == "glu"
    config = MoEConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_experts=case.num_experts,
        top_k=min(2, case.num_experts),
        gated=gated,
        activation="silu" if gated else "gelu_tanh",
    )
    layer = MoE(config, device=device, dtype=case.dtype)
    layer.reset_parameters(std=0.2, seed=0)
    return layer


def shares(case: Case, world_size: int) -> list[int]:
    """Length of each rank's part along the first dim, in tokens or sequences: more on the higher ranks."""
    return [(20 if case.dims == 2 else 1) + rank for rank in range(world_size)]


def batch_of_all_ranks(case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
    """The input, and the gradient of the loss with respect to the output."""
    total = sum(shares(case, dist.get_world_size()))
    shape = (total, WIDTH) if case.dims == 2 else (total, SEQ_LEN, WIDTH)
    draw = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(shape, generator=draw).to(device, case.dtype) for _ in range(2))
    return x, grad / total


def spread_layer(layer: MoE, mesh: ParallelMesh) -> None:
    """The library's own function for a model, applied to the one layer."""
    apply_expert_parallel(cast(Any, layer), mesh)


def sum_gradients(layer: MoE, mesh: ParallelMesh) -> None:
    """Data parallel, by hand: add up over the ranks that hold the same part of a parameter."""
    for parameter in layer.parameters():
        assert parameter.grad is not None
        spread = hasattr(parameter, "to_local")
        group = mesh.experts.get_group("efsdp") if spread else dist.group.WORLD
        dist.all_reduce(local(parameter.grad), group=group)


def train_step(layer: MoE, x: Tensor, grad: Tensor, mesh: ParallelMesh | None) -> dict[str, Tensor]:
    """A step of SGD; everything that must not depend on how the layer is spread, whole parameters."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    if mesh is not None:
        sum_gradients(layer, mesh)
    result = {"output": y.detach(), "input gradient": x.grad}
    result |= {f"{name} gradient": whole(p.grad) for name, p in layer.named_parameters() if p.grad is not None}
    torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE, foreach=False).step()
    result |= {f"{name} updated": whole(p.detach()) for name, p in layer.named_parameters()}
    result["output after the step"] = layer(x).detach()
    return result


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.clone()


def own_choices(trace: RoutingTrace, case: Case, rank: int) -> RoutingTrace:
    """Of the choices for the batch of all ranks, those for this rank's part."""
    sizes = [size * (1 if case.dims == 2 else SEQ_LEN) for size in shares(case, dist.get_world_size())]
    return RoutingTrace({name: [ids.split(sizes)[rank] for ids in all_ids] for name, all_ids in trace.layers.items()})


def differences(case: Case, mesh: ParallelMesh, device: torch.device) -> dict[str, float]:
    """Largest difference of each tensor over all ranks, as a share of the plain layer's largest value."""
    rank, sizes = dist.get_rank(), shares(case, dist.get_world_size())
    x, grad = batch_of_all_ranks(case, device)
    layer = build_layer(case, device)
    with record_routing(layer) as trace:
        plain = train_step(layer, x, grad, None)
    layer = build_layer(case, device)
    spread_layer(layer, mesh)
    choices = own_choices(trace, case, rank)
    with replay_routing(layer, choices) if case.dtype == torch.bfloat16 else contextlib.nullcontext():
        ours = train_step(layer, x.split(sizes)[rank], grad.split(sizes)[rank], mesh)
    result = {}
    for name, value in plain.items():
        mine = value.split(sizes)[rank] if ours[name].shape != value.shape else value
        result[name] = ((ours[name] - mine).abs().max() / value.abs().max()).item()
    worst = torch.tensor(list(result.values()), device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return dict(zip(result, worst.tolist()))


def line(case: Case, errors: dict[str, float], world_size: int) -> str:
    """The largest differences of a case, by what they are of."""
    largest = {
        kind: max(error for name, error in errors.items() if wanted(name))
        for kind, wanted in {
            "outputs": lambda name: name.startswith("output"),
            "gradients": lambda name: name.endswith("gradient"),
            "updated weights": lambda name: name.endswith("updated"),
        }.items()
    }
    bound = BOUNDS[case.dtype]
    experts = f"{case.num_experts} expert{'s' if case.num_experts > 1 else ' '}"
    text = f"{case.kind}, {experts}, dp {world_size} x ep {case.ep}, {case.dims}-D, {str(case.dtype)[6:]:>8}: "
    text += ", ".join(f"{kind} {error:.1e}" for kind, error in largest.items())
    text += f" (bound {bound:.0e}) {'ok' if passes(case, errors) else 'FAILED'}"
    if not case.can_spread:
        text += f"; {experts.strip()} cannot be spread over {case.ep} ranks: run as ep 1"
    return text


def passes(case: Case, errors: dict[str, float]) -> bool:
    return all(error <= BOUNDS[case.dtype] for error in errors.values())  # NaN does not


def main() -> None:
    parser = argparse.ArgumentParser(description="A MoE layer under data and expert parallel against one process.")
    parser.add_argument("--verify", action="store_true", help="always on; accepted so that every script takes it")
    parser.parse_args()
    rank, world_size, device = init_distributed()
    cases = all_cases(world_size)
    meshes = {
        ep: build_mesh(ParallelConfig(ep=ep), device_type=device.type) for ep in {case.ep: None for case in cases}
    }
    num_failed = 0
    for case in cases:
        errors = differences(case, meshes[case.ep if case.can_spread else 1], device)
        num_failed += not passes(case, errors)
        if rank == 0:
            print(line(case, errors, world_size), flush=True)
    if num_failed:
        raise RunError(f"{num_failed} of {len(cases)} cases differ from the plain layer by more than the bound")
    if rank == 0:
        print(f"verified: {len(cases)} cases on {world_size} ranks", flush=True)


if __name__ == "__main__":
    run(main)
