"""A layer with the experts' width split over ranks, as DTensors, next to the plain layer; for dispatch_worker.py."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from dispatch_cases import Case, differences, expected_of, run
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from dmoe.moe import BatchGroups, MoE
from dmoe.moe.dispatch import TensorParallelDispatcher


def spread_width(layer: MoE, mesh: DeviceMesh) -> MoE:
    """Each rank has a part of the gate rows, then of the up rows, and the same part of the columns of down_proj."""
    layer = copy.deepcopy(layer)
    rank, world, experts = mesh.get_local_rank(), mesh.size(), layer.experts
    halves = 2 if layer.config.gated else 1
    for name, parameter in list(experts.named_parameters()):
        whole, placement = parameter.detach(), Replicate()
        if name == "down_proj":
            whole, placement = whole.chunk(world, dim=2)[rank], Shard(2)
        elif name != "down_bias":
            whole = torch.cat([half.chunk(world, dim=1)[rank] for half in whole.chunk(halves, dim=1)], dim=1)
            placement = _StridedShard(1, split_factor=2) if layer.config.gated else Shard(1)
        shape, stride = parameter.shape, parameter.stride()
        spread = DTensor.from_local(
            whole.contiguous(), mesh, [placement], run_check=False, shape=shape, stride=stride
        )  # fmt: skip
        experts.register_parameter(name, nn.Parameter(spread))
    experts.adds_down_bias = rank == 0
    layer.dispatcher = TensorParallelDispatcher(mesh.get_group())
    layer.groups = BatchGroups(batch=mesh.get_group())
    return layer


def check(case: Case, mesh: DeviceMesh, tolerance: float) -> None:
    group = mesh.get_group()
    rank, world = group.rank(), group.size()
    x, grads = (t[rank] for t in case.batch())
    got, want = run(spread_width(case.full_layer(), mesh), x, grads, case), expected_of(case, rank)
    for name, grad in got.grads.items():
        if isinstance(grad, DTensor):
            local, halves = grad.to_local(), 2 if case.config.get("gated", True) else 1
            if name == "experts.down_bias":
                assert isinstance(grad.placements[0], Replicate) or grad.placements[0].is_partial()
                got.grads[name] = grad.full_tensor()
                continue
            whole = want.grads[name]
            if name == "experts.down_proj":
                want.grads[name] = whole.chunk(world, dim=2)[rank]
            else:
                own = [half.chunk(world, dim=1)[rank] for half in whole.chunk(halves, dim=1)]
                want.grads[name] = torch.cat(own, dim=1)
            got.grads[name] = local
        elif name != "x":
            wide = grad.double()
            dist.all_reduce(wide, group=group)
            got.grads[name] = wide.to(grad.dtype)
    for name, difference in differences(got, want).items():
        assert difference <= tolerance, (name, difference, case)
    assert got.stats.tokens_per_expert == want.stats.tokens_per_expert


def width_over_ranks(group: dist.ProcessGroup) -> None:
    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("tp",))
    losses = {"aux_loss_coef": 0.1, "z_loss_coef": 0.01}
    for num_tokens in (5, 0):
        for kind in (
            {"bias": True},
            {"gated": False, "bias": True},
            {"shared_intermediate_size": 8},
            {"weigh_input": True, "bias": True, "shared_intermediate_size": 8},
        ):
            for dtype, autocast, tolerance in (
                (torch.float64, False, 1e-12),
                (torch.float32, False, 1e-5),
                (torch.bfloat16, False, 0.03),
                (torch.float32, True, 0.03),
            ):
                config = {**kind, **losses}
                check(Case([num_tokens] * group.size(), dtype, "one", autocast, config=config), mesh, tolerance)
