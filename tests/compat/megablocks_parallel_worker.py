"""One of the 4 ranks of test_megablocks_parallel.py: layers over ranks against one layer on the tokens of all."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from dmoe.compat.megablocks.layers import dmoe, moe, mpu
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.errors import ConfigError
from dmoe.ops.collectives import leave_process_group

WIDTH, FEATURES = 12, 8


def arguments(**kwargs: Any) -> Arguments:
    given = {"fp16": False, "device": "cpu", "hidden_size": WIDTH, "ffn_hidden_size": FEATURES, "return_bias": False}
    return Arguments(**{**given, "activation_fn": F.silu, **kwargs})


def make(cls: type[nn.Module], args: Arguments) -> nn.Module:
    torch.manual_seed(5)
    return cls(args)


def tokens_of(sizes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(sizes))
    return [torch.randn(n, WIDTH, generator=generator) for n in sizes]


def local_part(name: str, whole: Tensor, args: Arguments, dropless: bool) -> Tensor:
    """Of an expert weight, or its gradient, what this rank holds; of another parameter all."""
    if ".mlp." not in name:
        return whole
    esd = min(mpu.get_expert_parallel_world_size(args), args.moe_num_experts)
    rank, experts = mpu.get_expert_parallel_rank(args), args.moe_num_experts // esd
    features = FEATURES * esd // mpu.get_expert_parallel_world_size(args)
    rows, columns = (slice(i * n, (i + 1) * n) for i, n in ((rank // esd, features), (rank % esd, experts)))
    if dropless:
        return whole.view(-1, FEATURES, WIDTH)[columns, rows].reshape(-1, WIDTH)
    return whole[columns, :, rows] if name.endswith("w1") else whole[columns, rows]


def close(ours: Tensor, theirs: Tensor, what: Any, tolerance: float = 1e-7) -> None:
    """To `tolerance`, or that of the largest value if it is more than 1."""
    assert ours.shape == theirs.shape, (what, ours.shape, theirs.shape)
    tolerance *= max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance, msg=lambda m: f"{what}: {m}")


def compare(cls: type[nn.Module], args: Arguments, ranks: list[int], sizes: list[int], dtensor: bool = False) -> None:
    """Outputs, counts and all gradients; `ranks` are those of the group and `sizes` their numbers of tokens."""
    dropless, me = cls is dmoe.dMoE, ranks.index(dist.get_rank())
    whole_args = arguments(**{
        name: getattr(args, name)
        for name in ("moe_num_experts", "moe_top_k", "mlp_type", "activation_fn", "moe_capacity_factor", "bias",
                     "shared_expert", "memory_optimized_mlp")
    })  # fmt: skip
    whole, layer = make(cls, whole_args), make(cls, args)
    case = (cls.__name__, args.moe_num_experts, args.moe_top_k, args.mlp_type, sizes)
    for name, p in whole.named_parameters():
        ours = layer.get_parameter(name)
        assert torch.equal(ours, local_part(name, p, args, dropless)), (case, name)
        assert mpu.is_moe_param(ours) == (".mlp." in name)
        assert mpu.param_is_expert_model_parallel(ours) == (".mlp." in name)
    if dtensor:
        mesh = DeviceMesh.from_group(args.expert_parallel_group or dist.group.WORLD, "cpu")
        for name, p in list(layer.experts.mlp.named_parameters()):
            spread = DTensor.from_local(p.detach(), mesh, [Shard(0)], run_check=False)
            layer.experts.mlp.register_parameter(name, nn.Parameter(spread))

    tokens = tokens_of(sizes)
    all_x = torch.cat(tokens).requires_grad_()
    x = tokens[me].clone().requires_grad_()
    moe.clear_load_balancing_loss()
    all_out, out = whole(all_x), layer(x)
    (all_counts, _), (counts, scores) = moe.get_load_balancing_loss()
    close(out, all_out.split(sizes)[me], (case, "out"))
    summed = counts.clone()
    dist.all_reduce(summed, group=args.expert_parallel_group)
    assert torch.equal(summed, all_counts), case
    assert scores.shape == (sizes[me], args.moe_num_experts)

    out.sin().sum().backward()
    all_out.sin().sum().backward()
    close(x.grad, all_x.grad.split(sizes)[me], (case, "x"))
    for name, p in whole.named_parameters():
        ours = layer.get_parameter(name).grad
        if ".mlp." in name:  # the mean of the ranks' losses, where one process has the sum
            ours = (ours.to_local() if dtensor else ours) * len(ranks)
        else:
            dist.all_reduce(ours, group=args.expert_parallel_group)
        close(ours, local_part(name, p.grad, args, dropless), (case, name), 4e-7)  # sums in another order
    moe.clear_load_balancing_loss()


def token_counts(world: int) -> list[list[int]]:
    return [[6] * world, [0, 7, 3, 1][:world], [5, *[0] * (world - 1)], [0] * world]


def layouts(ranks: list[int], group: dist.ProcessGroup, part: slice) -> None:
    """Every number of experts a group of this size can have: with fewer than ranks, features are divided too."""
    world = len(ranks)
    experts = [n for n in (1, 2, 4, 8, 12) if world % n == 0 or n % world == 0]
    kinds = ((dmoe.dMoE, "mlp"), (dmoe.dMoE, "glu"), (moe.MoE, "mlp"))
    for i, (num_experts, (cls, mlp_type)) in list(enumerate(product(experts, kinds)))[part]:
        whole_world = i % 2 and world == dist.get_world_size()
        args = arguments(
            moe_num_experts=num_experts, moe_top_k=min(1 + i // 2 % 2, num_experts), mlp_type=mlp_type,
            moe_expert_model_parallelism=True, activation_fn=(F.silu, torch.tanh)[i // 3 % 2],
            moe_capacity_factor=(1, 0.5, 0)[i // 3 % 3], bias=i % 3 > 0, shared_expert=i % 4 == 1,
            memory_optimized_mlp=i % 5 == 0, expert_parallel_group=None if whole_world else group,
        )  # fmt: skip
        for sizes in (token_counts(world)[i % 4], token_counts(world)[(i + 1) % 4]):
            compare(cls, args, ranks, sizes, dtensor=i % 5 == 2)


def half_precision(world: int) -> None:
    """In bf16 the rows that travel and what is computed are those of one process, to rounding; autocast too."""
    rank = dist.get_rank()
    tokens = tokens_of([5] * world)
    args = arguments(moe_num_experts=4, moe_top_k=2, moe_expert_model_parallelism=True)
    layer, whole = make(dmoe.dMoE, args), make(dmoe.dMoE, arguments(moe_num_experts=4, moe_top_k=2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = layer(tokens[rank]), whole(torch.cat(tokens)).split([5] * world)[rank]
    close(ours.float(), theirs.float(), "autocast", 1e-2)
    moe.clear_load_balancing_loss()


def refused(world: int) -> None:
    for kwargs, message in (
        ({"moe_num_experts": 2 * world + 1}, "moe_num_experts is"),
        ({"moe_num_experts": 1, "ffn_hidden_size": world + 1}, "ffn_hidden_size is"),
        ({"moe_num_experts": 4, "moe_expert_choice": True}, "moe_expert_model_parallelism is True"),
    ):
        for cls in (dmoe.dMoE, moe.MoE):
            with pytest.raises(ConfigError, match=message):
                cls(arguments(moe_expert_model_parallelism=True, **kwargs))


def rank_main(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    layouts(list(range(world)), dist.group.WORLD, slice(None))
    # Two groups of two, each with half of the cases.
    pairs = [[0, 1], [2, 3]]
    groups = [dist.new_group(pair) for pair in pairs]
    layouts(pairs[rank // 2], groups[rank // 2], slice(rank // 2, None, 2))
    half_precision(world)
    refused(world)
    leave_process_group()
