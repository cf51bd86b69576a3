"""One rank of test_dispatch_gpu.py. The ranks share one GPU, so that their messages go through gloo."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from dispatch_cases import Case, actual, differences
from dispatch_early import gradients_travel_while_weights_are_computed
from dispatch_worker import check

from dmoe.ops.collectives import leave_process_group

LOSSES = {"aux_loss_coef": 0.1, "z_loss_coef": 0.01, "shared_intermediate_size": 16}


def both_dispatchers(group: dist.ProcessGroup) -> None:
    """Over batches of every kind, against the plain layer."""
    world = group.size()
    batches = [[60, 90, 0, 40][:world], [0] * world, [1] + [0] * (world - 2) + [900], [400, 3, 700, 256][:world]]
    number = 0
    for num_experts, top_k in ((4, 2), (8, 8), (12, 3)):
        for skew in ("", "one", "none")[: 3 if top_k < num_experts else 2]:
            for sends in ("picks", "tokens"):
                config = {"num_experts": num_experts, "top_k": top_k, **LOSSES}
                case = Case(batches[number % 4], torch.float32, skew, sends=sends, device="cuda", config=config)
                check(case, 1e-5, group)
                check(dataclasses.replace(case, autocast=True), 0.03, group)
                check(dataclasses.replace(case, dtype=torch.bfloat16), 0.03, group)
            number += 1


def picks_of_no_expert(group: dist.ProcessGroup) -> None:
    config = {"num_experts": 8, "top_k": 3, "capacity_factor": 1.0}  # counts the tokens of a rank, so one has them all
    case = Case([0] * (group.size() - 1) + [300], torch.float32, "one", sends="tokens", device="cuda", config=config)
    check(case, 1e-5, group)


def same_bits_again(group: dist.ProcessGroup) -> None:
    config = {"num_experts": 8, "top_k": 3}
    for payload in ("same", "bf16", "fp8"):
        case = Case([500] * group.size(), torch.bfloat16, payload=payload, sends="tokens", device="cuda", config=config)
        assert max(differences(actual(case, group), actual(case, group)).values()) == 0


def rank_main(rank: int, world: int, store_path: str) -> None:
    torch.cuda.set_device(0)
    store = dist.FileStore(store_path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    both_dispatchers(group)
    picks_of_no_expert(group)
    same_bits_again(group)
    gradients_travel_while_weights_are_computed(group, "cuda", torch.bfloat16)
    dist.barrier()
    leave_process_group()
