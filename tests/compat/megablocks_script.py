"""A program written for MegaBlocks, started by tests/compat/test_megablocks_install.py; it never names this package.

Its ranks check what they see and exchange rows; rank 0 spawns a process.
"""

import importlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import time

import megablocks
import pytest
import torch
import torch.distributed as dist
from megablocks.layers.all_to_all import all_to_all
from megablocks.layers.arguments import Arguments
from megablocks.layers.dmoe import dMoE
from megablocks.layers.moe import MoE
from megablocks.ops.cumsum import inclusive_cumsum
from megablocks.ops.sort import sort

# What upstream has.
MODULES = [
    *("layers", "ops", "backend", "backend.kernels", "grouped_gemm_util", "_version"),
    *(f"layers.{name}" for name in (
        "arguments", "moe", "dmoe", "mlp", "glu", "mpu", "router", "common", "all_to_all", "activation_fn", "gelu",
        "dmlp_registry", "sharedexpert_registry",
    )),
    *(f"ops.{name}" for name in (
        "binned_gather", "binned_scatter", "cumsum", "gather", "histogram", "padded_gather", "padded_scatter", "repeat",
        "replicate", "round_up", "scatter", "sort", "sum", "topology",
    )),
]  # fmt: skip


def check_names() -> None:
    ours = importlib.import_module(megablocks.__name__)
    assert ours is megablocks
    assert megablocks.__name__ != "megablocks"
    assert megablocks.__version__.startswith("0.10.0")
    assert importlib.util.find_spec("megablocks") is not None
    for name in MODULES:
        module = importlib.import_module(f"megablocks.{name}")
        assert module is importlib.import_module(f"{megablocks.__name__}.{name}"), name
    registered = [name for name in sys.modules if name.partition(".")[0] == "megablocks"]
    assert not [name for name in registered if sys.modules[name].__name__ == name], "a second copy of a module"
    install = importlib.import_module(f"{megablocks.__name__}.installation").install
    assert install() is megablocks
    assert [name for name in sys.modules if name.partition(".")[0] == "megablocks"] == registered
    # The functions have their modules' names, which they hide.
    assert megablocks.ops.sort is sort
    assert megablocks.ops.inclusive_cumsum is inclusive_cumsum
    assert callable(megablocks.ops.padded_gather)
    assert megablocks.layers.moe.MoE is megablocks.MoE is MoE
    with pytest.raises(ModuleNotFoundError, match="megablocks_ops"):
        importlib.import_module("megablocks_ops")


def check_classes() -> None:
    args = Arguments(hidden_size=8, ffn_hidden_size=16, moe_num_experts=3, moe_top_k=2, fp16=False, device="cpu")
    layer = dMoE(args)
    assert isinstance(layer, MoE)
    assert isinstance(layer, sys.modules[f"{megablocks.__name__}.layers.dmoe"].dMoE)
    assert pickle.loads(pickle.dumps(args)).ffn_hidden_size == 16
    # A pickle of MegaBlocks' own names its modules.
    named = pickle.dumps(Arguments, protocol=0).replace(megablocks.__name__.encode(), b"megablocks")
    assert pickle.loads(named) is Arguments
    out, bias = layer(torch.randn(4, 2, 8))
    assert (out.shape, bias.shape) == ((4, 2, 8), (8,))


def seen_by_a_child() -> tuple[str, str]:
    return dMoE.__module__, megablocks.ops.sort.__module__


def check_exchange(rank: int, world: int) -> None:
    counts = [[(3 * s + 2 * r) % 4 for r in range(world)] for s in range(world)]  # [s][r]: from s to r, some zero
    send, receive = counts[rank], [counts[s][rank] for s in range(world)]

    def rows_of(sender: int) -> torch.Tensor:
        return torch.randn(sum(counts[sender]), 3, generator=torch.Generator().manual_seed(sender), dtype=torch.float64)

    def received(dtype: torch.dtype) -> torch.Tensor:
        return torch.cat([rows_of(s).split(counts[s])[rank] for s in range(world)]).mul(9).to(dtype)

    for dtype in (torch.float64, torch.int32, torch.int16, torch.bool):
        x = rows_of(rank).mul(9).to(dtype)
        out, handle = all_to_all(x, receive, send, None)
        assert handle is None
        first, first_handle = all_to_all(x, receive, tuple(send), dist.group.WORLD, async_op=True)
        second, second_handle = all_to_all(x, receive, send, dist.group.WORLD, True)
        for result, wait in ((second, second_handle.wait), (first, first_handle.wait), (out, lambda: True)):
            assert wait()
            assert wait()
            assert type(result) is torch.Tensor
            assert torch.equal(result, received(dtype))

    # Loss: sum over the ranks r of (r + 1) * sum of the cubes of what r received.
    for async_op in (False, True):
        x = rows_of(rank).requires_grad_()
        out, handle = all_to_all(x * 1.0, receive, send, None, async_op)
        if handle is not None:
            handle.wait()
        ((rank + 1) * out.pow(3).sum()).backward()
        factors = torch.tensor([r + 1.0 for r in range(world) for _ in range(send[r])], dtype=torch.float64)
        torch.testing.assert_close(x.grad, factors.unsqueeze(1) * 3 * rows_of(rank).square())
    for async_op in (False, True):
        with pytest.raises(ValueError, match="send_counts is"):
            all_to_all(rows_of(rank), receive, [n + 1 for n in send], None, async_op)


def check_shares(rank: int, world: int) -> None:
    mpu = megablocks.layers.mpu
    args = Arguments(moe_num_experts=2 * world, moe_expert_model_parallelism=True, fp16=False, device="cpu")
    assert (mpu.get_expert_parallel_rank(args), mpu.get_expert_parallel_world_size(args)) == (rank, world)
    assert (mpu.experts_per_rank(args), mpu.features_per_rank(args)) == (2, args.ffn_hidden_size)
    args.moe_num_experts = 1
    assert (mpu.experts_per_rank(args), mpu.features_per_rank(args)) == (1, args.ffn_hidden_size // world)
    args.expert_parallel_group = [dist.new_group([r]) for r in range(world)][rank]
    assert mpu.get_expert_parallel_world_size(args) == 1
    mpu.synchronized_print(None, "is", "here")


if __name__ == "__main__":
    assert sys.argv[1:] == ["a", "--b", "-m"], sys.argv
    assert sys.argv[0] == __file__
    assert sys.path[0] == os.path.dirname(os.path.realpath(__file__))
    check_names()
    check_classes()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    check_exchange(rank, world)
    check_shares(rank, world)
    dist.destroy_process_group()
    time.sleep(0.1)  # a thread of gloo still needs Python's lock
    if rank == 0:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seen = pool.apply(seen_by_a_child)
        assert seen == seen_by_a_child(), seen
