"""One rank of test_dispatch_compile.py: layers with their experts spread over ranks, under torch.compile."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable

import torch
import torch.distributed as dist
from dispatch_cases import Case, actual, differences
from dispatch_no_expert import compiled_picks_of_no_expert
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dmoe.moe import MoE
from dmoe.ops.collectives import leave_process_group

HAS_COMPILER = any(map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++")))
CONFIG = {"shared_intermediate_size": 16, "aux_loss_coef": 0.1, "z_loss_coef": 0.01, "backend": "torch"}


def whole(layer: MoE, backend: object) -> Callable[[Tensor], Tensor]:
    return torch.compile(layer, fullgraph=True, backend=backend)


def checkpoint_inside(layer: MoE, backend: object) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend=backend)


def checkpoint_outside(layer: MoE, backend: object) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    return lambda x: checkpoint(compiled, x, use_reentrant=False)


def same_as_eager(
    group: dist.ProcessGroup, way: Callable[..., Callable[[Tensor], Tensor]], case: Case, backend: str
) -> None:
    """Over batches of several sizes and routings, one after the other through one compiled layer."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled: dict[str, Callable[[Tensor], Tensor]] = {}

    def call(layer: MoE) -> Callable[[Tensor], Tensor]:
        # The compiled code is looked up by the function, so that a new layer of the same kind finds it.
        return compiled.setdefault("it", way(layer, counter))

    numbers = [[9, 12], [9, 12], [30, 2], [17, 40]]
    layers: list[MoE] = []
    for number, tokens in enumerate(numbers):
        each = dataclasses.replace(case, tokens=tokens, seed=number)
        want = actual(each, group)
        got = actual(dataclasses.replace(each, call=call), group, layers)
        limit = 0.03 if case.autocast or case.payload != "same" else 1e-5
        worst = max(differences(got, want).values())
        assert worst <= limit, (tokens, differences(got, want))
        assert got.stats.tokens_per_expert == want.stats.tokens_per_expert
    assert counter.frame_count <= 3, f"compiled {counter.frame_count} times"


def rank_main(rank: int, world: int, store_path: str) -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.capture_scalar_outputs = True
    store = dist.FileStore(store_path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    case = Case([], torch.float32, config=CONFIG)
    same_as_eager(group, whole, case, "inductor" if HAS_COMPILER else "aot_eager")
    same_as_eager(group, checkpoint_inside, dataclasses.replace(case, skew="one"), "aot_eager")
    same_as_eager(group, checkpoint_outside, dataclasses.replace(case, payload="fp8", autocast=True), "aot_eager")
    compiled_picks_of_no_expert(group)
    dist.barrier()
    leave_process_group()
