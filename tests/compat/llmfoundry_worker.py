"""One rank of test_llmfoundry.py: a training step over (weight_parallel, expert_parallel), and initial weights.

The oracle is `LoopBlock`: plain torch, a loop over experts, the whole weights on every rank, wrapped in DDP.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform
from torch.nn.parallel import DistributedDataParallel

from dmoe.compat.megablocks.layers import mpu
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.dmoe import dMoE
from dmoe.compat.megablocks.layers.moe import MoE, batched_load_balancing_loss, clear_load_balancing_loss
from dmoe.integrations.llmfoundry import build_mb_ffn, build_moe_mesh, init_fused_or_stacked, init_mb_ffn
from dmoe.ops.collectives import leave_process_group

WIDTH, EXPERT_WIDTH, LOSS_WEIGHT, LEARNING_RATE = 8, 12, 0.05, 0.1
KINDS = (("mb_dmoe", "mlp"), ("mb_dmoe", "glu"), ("mb_moe", "mlp"))
WEIGHTS = ("experts.mlp.w1", "experts.mlp.w2", "experts.mlp.v1")


class LoopBlock(nn.Module):
    """The block in plain torch, from the whole weights of one of ours."""

    def __init__(self, weights: dict[str, Tensor], top_k: int, num_experts: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, num_experts
        self.names = list(weights)
        self.weights = nn.ParameterList([nn.Parameter(w.clone()) for w in weights.values()])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = dict(zip(self.names, self.weights))
        x_TD = x.reshape(-1, WIDTH)
        scores_TE = (x_TD @ weights["router.layer.weight"].t()).softmax(-1)
        picked_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        picked_TK = picked_TK / picked_TK.sum(-1, keepdim=True)
        w1, w2, v1 = (weights.get(name) for name in WEIGHTS)
        w1 = w1.transpose(1, 2) if w1.dim() == 3 else w1.view(-1, EXPERT_WIDTH, WIDTH)
        w2 = w2.view(-1, EXPERT_WIDTH, WIDTH)
        y_TD = torch.zeros_like(x_TD)
        for e in range(self.num_experts):
            hidden = F.silu(x_TD @ w1[e].t())
            if v1 is not None:
                hidden = hidden * (x_TD @ v1.view(-1, EXPERT_WIDTH, WIDTH)[e].t())
            y_TD = y_TD + (picked_TK * (ids_TK == e)).sum(-1, keepdim=True) * (hidden @ w2[e])
        if "experts.bias" in weights:
            y_TD = y_TD + weights["experts.bias"]
        counts_E = torch.stack([(ids_TK == e).sum() for e in range(self.num_experts)]).to(scores_TE)
        share = self.num_experts * LOSS_WEIGHT / max(1, ids_TK.numel())
        mean_scores_E = scores_TE.sum(0) / max(1, scores_TE.shape[0])
        return y_TD.view(x.shape), share * (counts_E * mean_scores_E).sum()


def rank_main(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # of gathering in two steps
    meshes = {size: build_moe_mesh(size) for size in {2: (1, 2), 4: (2, 4)}[world]}
    for mesh in meshes.values():
        assert mesh.mesh_dim_names == ("weight_parallel", "expert_parallel")
        assert mesh.size() == world
    for case in cases(world):
        check_step(meshes[case["moe_world_size"]], **case)
    for mesh in meshes.values():
        for kind, mlp_type in KINDS:
            check_init(kind, mlp_type, mesh, 4)
    if world == 4:
        for kind, mlp_type in KINDS:
            check_init_hidden_sharding(kind, mlp_type)
    leave_process_group()


def cases(world: int) -> Iterator[dict[str, Any]]:
    sizes = {2: (1, 2), 4: (2, 4)}[world]
    for n, (size, (kind, mlp_type), top_k, wrap) in enumerate(product(sizes, KINDS, (1, 2), ("ddp", "fsdp"))):
        if world == 4 and (n % 4 in (0, 3)) != (size == 4):
            continue  # half of (top_k, wrap) for one size, half for the other: time
        num_experts = 4 if size == 4 else 6
        yield {
            "moe_world_size": size, "kind": kind, "mlp_type": mlp_type, "top_k": top_k, "wrap": wrap,
            "two_d_input": n // 2 % 2 == 0, "bias": n % 3 != 0, "num_experts": num_experts,
            "capacity_factor": 0 if n % 5 else num_experts,  # neither drops
        }  # fmt: skip


def inputs(rank: int, two_d_input: bool) -> Tensor:
    """Another number of tokens on each rank: one alone on the last of two ranks, none on the last of four."""
    world = dist.get_world_size()
    shape = (1 + rank % 2, 3 + 2 * rank)
    if rank == world - 1:
        shape = (1, 1 if world == 2 else 0)
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(100 + rank))
    return x.view(-1, WIDTH) if two_d_input else x


def check_step(
    mesh: DeviceMesh, *, moe_world_size: int, kind: str, mlp_type: str, top_k: int, wrap: str, two_d_input: bool,
    bias: bool, num_experts: int, capacity_factor: int,
) -> None:  # fmt: skip
    """Outputs, balancing loss and parameters after a step of SGD are those of the loop under DDP."""
    config = {
        "moe_num_experts": num_experts, "moe_top_k": top_k, "moe_world_size": moe_world_size, "mlp_type": mlp_type,
        "moe_capacity_factor": capacity_factor, "moe_loss_weight": LOSS_WEIGHT, "moe_normalize_expert_weights": 1,
        "fc_type": {"name": "torch"}, "lbl_process_group": None, "num_layers": 1,
    }  # fmt: skip
    ffn: Any = build_mb_ffn(
        kind, WIDTH, ffn_hidden_size=EXPERT_WIDTH, ffn_config=config, ffn_act_fn={"name": "silu"}, device="cpu",
        device_mesh=mesh, bias=bias,
    )  # fmt: skip
    args = ffn.experts.args
    torch.manual_seed(7)
    init_mb_ffn(ffn, nn.init.xavier_normal_)
    if bias:
        nn.init.normal_(ffn.experts.bias)
    loop = DistributedDataParallel(LoopBlock(whole(ffn.named_parameters()), top_k, num_experts))
    parameters = wrap_block(ffn, mesh, wrap)
    optimizers = [torch.optim.SGD(p, lr=LEARNING_RATE) for p in (parameters.values(), loop.parameters())]
    x = inputs(dist.get_rank(), two_d_input)
    for _ in range(2):
        y, (expected, expected_lbl) = ffn(x), loop(x)
        lbl = batched_load_balancing_loss(args)
        clear_load_balancing_loss()
        close(y, expected, "output")
        close(lbl, expected_lbl, "balancing loss")
        (y.square().sum() + lbl).backward()
        (expected.square().sum() + expected_lbl).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    after = whole(parameters.items(), mesh["expert_parallel"].get_group())
    assert set(after) == set(loop.module.names)
    for name, expected in zip(loop.module.names, loop.module.weights):
        close(after[name], expected, name)


def wrap_block(ffn: Any, mesh: DeviceMesh, wrap: str) -> dict[str, nn.Parameter]:
    """Put wrappers that average gradients in place of router and experts; returns the parameters to optimise."""
    spread = mesh["expert_parallel"].size() > 1
    if wrap == "fsdp":
        fully_shard(ffn.experts, mesh=mesh["weight_parallel"] if spread else world_mesh())
        if spread:
            assert ffn.experts._fsdp_kwargs_dict["device_mesh"] == mesh["weight_parallel"]
        fully_shard(ffn.router, mesh=world_mesh())
        return dict(ffn.named_parameters())
    if spread:
        _pre_dp_module_transform(ffn.experts.mlp)
    parameters = dict(ffn.named_parameters())
    ffn.router = DistributedDataParallel(ffn.router)
    group = mesh["weight_parallel"].get_group() if spread else None
    ffn.experts = DistributedDataParallel(ffn.experts, process_group=group)
    return parameters


_world_meshes: list[DeviceMesh] = []


def world_mesh() -> DeviceMesh:
    if not _world_meshes:
        _world_meshes.append(init_device_mesh("cpu", (dist.get_world_size(),)))
    return _world_meshes[0]


def whole(parameters: Any, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Every parameter in full; expert weights that are plain tensors are parts along dim 0, one on each rank."""
    result = {}
    for name, parameter in parameters:
        value = parameter.detach()
        if isinstance(value, DTensor):
            value = value.full_tensor()
        elif name in WEIGHTS and group is not None:
            parts = [torch.empty_like(value) for _ in range(group.size())]
            dist.all_gather(parts, value.contiguous(), group=group)
            value = torch.cat(parts)
        result[name] = value
    return result


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6, msg=lambda text: f"{name}: {text}")


def check_init(kind: str, mlp_type: str, mesh: DeviceMesh, num_experts: int) -> None:
    """Bit for bit the values of one process: spread over experts, and with FSDP2 over that."""
    config = {"moe_num_experts": num_experts, "mlp_type": mlp_type}

    def build(over: DeviceMesh | None) -> Any:
        return build_mb_ffn(kind, WIDTH, ffn_hidden_size=EXPERT_WIDTH, ffn_config=config, device_mesh=over)

    def init(block: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(11)
        init_mb_ffn(block, nn.init.normal_, div_is_residual=2.0)
        return whole(block.named_parameters())

    expected = init(build(None))
    spread = build(mesh)
    if mesh["expert_parallel"].size() > 1:
        marks = {mpu.param_is_expert_model_parallel(p) for p in spread.experts.mlp.parameters()}
        assert marks == {True}
        assert all(isinstance(p, DTensor) for p in spread.experts.mlp.parameters())
    actual = init(spread)
    sharded = build(mesh)
    fully_shard(sharded.experts, mesh=mesh["weight_parallel"])
    for got in (actual, init(sharded)):
        assert set(got) == set(expected)
        for name in expected:
            assert torch.equal(got[name], expected[name]), (kind, name)


def check_init_hidden_sharding(kind: str, mlp_type: str) -> None:
    """More ranks than experts: each expert's width is split. Rank r has expert r % 2 and half r // 2 of its width."""
    arguments = {
        "hidden_size": WIDTH, "ffn_hidden_size": EXPERT_WIDTH, "moe_num_experts": 2, "mlp_type": mlp_type,
        "fp16": False, "device": "cpu",
    }  # fmt: skip
    layer = dMoE if kind == "mb_dmoe" else MoE
    one: Any = layer(Arguments(**arguments))
    split: Any = layer(Arguments(**arguments, moe_expert_model_parallelism=True))
    for block, group in ((one, None), (split, dist.group.WORLD)):
        mlp = block.experts.mlp
        mlp.hidden_size, mlp.expert_parallel_group = EXPERT_WIDTH, group
        if kind == "mb_dmoe":
            mlp._fused = (0, [EXPERT_WIDTH] if block is one else [])
        else:
            mlp._stack_dim = 0
        torch.manual_seed(13)
        init_fused_or_stacked(mlp, nn.init.normal_)
    expert, half = dist.get_rank() % 2, dist.get_rank() // 2
    for name, parameter in split.experts.mlp.named_parameters():
        expected = copy.deepcopy(dict(one.experts.mlp.named_parameters())[name]).detach()
        if kind == "mb_dmoe":
            expected = expected.view(2, 2, EXPERT_WIDTH // 2, WIDTH)[expert, half]
        else:
            expected = expected[expert : expert + 1].chunk(2, dim=2 if name == "w1" else 1)[half]
        assert torch.equal(parameter.detach(), expected), (kind, name)
