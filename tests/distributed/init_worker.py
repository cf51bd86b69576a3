"""A rank of test_init_layouts.py: every layout gives the initial weights of one process, bit for bit."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.checkpoint.stored_form import stored_form
from dmoe.config import ModelConfig, MoEConfig, ParallelConfig, TrainConfig
from dmoe.errors import ConfigError
from dmoe.models import Decoder
from dmoe.moe import init_parameters, streams
from dmoe.moe.sharded import copy_shard, local
from dmoe.ops.collectives import leave_process_group
from dmoe.parallel import build_mesh, parallelize

RULES: list[dict[str, Any]] = [
    {"rule": "normal", "depth": "all", "num_layers": 2},
    {"rule": "trunc_normal", "depth": "layer"},
    {"rule": "mitchell"},
    {"rule": "mup", "base_width": 4},
]
EVEN = ModelConfig(
    vocab_size=67, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24,
    first_k_dense=1, tie_embeddings=False,
    moe=MoEConfig(intermediate_size=12, num_experts=8, top_k=2, shared_intermediate_size=10),
)  # fmt: skip
# Six experts over four ranks: two each, and the last has none. Nothing else divides either.
ODD = replace(
    EVEN, hidden_size=15, num_heads=3, num_kv_heads=1, head_dim=6, intermediate_size=13,
    moe=MoEConfig(intermediate_size=11, num_experts=6, top_k=2, shared_intermediate_size=7, bias=True),
)  # fmt: skip
TWO_EXPERTS = replace(EVEN, moe=replace(EVEN.moe, num_experts=2))

LAYOUTS: dict[str, tuple[dict[str, int], ModelConfig]] = {
    "ep 4": ({"ep": 4}, EVEN),
    "fsdp 2 x ep 2": ({"dp_shard": 4, "ep": 2}, EVEN),
    "fsdp 2 x ep 2, an expert a rank": ({"dp_shard": 4, "ep": 2}, TWO_EXPERTS),
    "fsdp 2 x tp 2": ({"dp_shard": 2, "tp": 2}, EVEN),
    "fsdp 2 x tp 2 x ep 4": ({"dp_shard": 2, "tp": 2, "ep": 4}, EVEN),
    "fsdp 4, uneven": ({"dp_shard": 4}, ODD),
    "hsdp 2 x 2, uneven": ({"dp_replicate": 2, "dp_shard": 2}, ODD),
}


def rank_main(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=300))
    with pytest.MonkeyPatch.context() as patch:
        for name, (parallel, config) in LAYOUTS.items():
            layout_has_the_weights_of_one_process(patch, name, parallel, config)
        patch.setattr(streams, "BLOCK_ELEMENTS", 100)
        any_placement(init_device_mesh("cpu", (2, 2)))
        strided_placements(init_device_mesh("cpu", (2, 2)))
        without_a_seed(init_device_mesh("cpu", (2, 2)))
        a_shard_of_another_size_is_an_error(init_device_mesh("cpu", (4,)))
        only_what_is_needed_is_drawn(patch)
    dist.barrier()
    leave_process_group()


def spread(parallel: dict[str, int], config: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    mesh = build_mesh(ParallelConfig(**parallel))  # type: ignore[arg-type]
    train = TrainConfig(batch_size=8, micro_batch_size=4, seq_len=16, device="cpu")
    (part,) = parallelize(config, mesh, train, dtype=dtype)
    return part.to_empty(device="cpu")


def layout_has_the_weights_of_one_process(
    patch: pytest.MonkeyPatch, layout: str, parallel: dict[str, int], config: ModelConfig
) -> None:
    part, alone = spread(parallel, config), Decoder(config)
    expected = dict(alone.named_parameters())
    places = {name: indices_of_shard(name, p) for name, p in part.named_parameters()}
    # No multiple of a row, so that blocks begin and end inside of experts; a row can be longer than one.
    for block, rules in ((20, RULES[1:2]), (100, RULES), (2**20, RULES[:1])):
        patch.setattr(streams, "BLOCK_ELEMENTS", block)
        for rule in rules:
            init_parameters(alone, std=0.3, seed=6, **rule)
            for p in part.parameters():
                local(p).detach().fill_(float("nan"))
            init_parameters(part, std=0.3, seed=6, **rule)
            for name, p in part.named_parameters():
                wanted = expected[name].detach().flatten()[places[name]]
                assert torch.equal(local(p).detach().flatten(), wanted), (layout, rule, block, name)


def indices_of_shard(name: str, parameter: Tensor) -> Tensor:
    """Where in the flattened whole each element of this rank's shard is, by torch: shards of numbers, assembled."""
    parameter = parameter.detach()
    size, owner = parameter.numel(), dist.get_rank() * 2**30
    if not isinstance(parameter, DTensor):
        return torch.arange(size)
    numbers = torch.arange(parameter.to_local().numel()).view_as(parameter.to_local()) + owner
    spread_numbers = DTensor.from_local(
        numbers, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape,
        stride=parameter.stride(),
    )  # fmt: skip
    whole = assembled(name, spread_numbers).flatten()
    mine = (whole // 2**30 == dist.get_rank()).nonzero().flatten()
    indices = torch.full((numbers.numel(),), -1)
    indices[whole[mine] - owner] = mine
    assert (indices >= 0).all()
    return indices


def assembled(name: str, parameter: Tensor) -> Tensor:
    """In the form of a checkpoint: gate and up parts side by side are not a layout that torch 2.11 can assemble."""
    form: Any = stored_form(name, parameter)
    return form.full_tensor().reshape(parameter.shape)


class Holder(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)


def any_placement(mesh: DeviceMesh) -> None:
    """Every dim on every axis, one dim on both, uneven and with empty shards, cut by torch from the whole."""
    choices: list[Placement] = [Replicate(), Shard(0), Shard(1), Shard(2)]
    for shape in ((5, 3, 7), (2, 9, 4)):
        alone = Holder(torch.empty(shape))
        init_parameters(alone, seed=8, rule="trunc_normal")
        for placements in [(a, b) for a in choices for b in choices]:
            wanted = distribute_tensor(alone.w.detach(), mesh, placements, src_data_rank=None)
            for dtype in (torch.float32, torch.bfloat16):
                holder = Holder(torch.full_like(wanted, float("nan"), dtype=dtype))
                init_parameters(holder, seed=8, rule="trunc_normal")
                assert torch.equal(local(holder.w.detach()), wanted.to_local().to(dtype)), (shape, placements)
            copied: Any = torch.full_like(wanted, float("nan"))
            copy_shard(copied, alone.w.detach())
            assert torch.equal(copied.to_local(), wanted.to_local()), (shape, placements)


def strided_placements(mesh: DeviceMesh) -> None:
    """Gate and up parts, and FSDP over tensor parallel, on any dim; cut here, for torch 2.11 cannot."""
    i, j = mesh.get_coordinate() or ()
    shape = (4, 12, 8)
    alone = Holder(torch.empty(shape))
    init_parameters(alone, seed=8)
    whole = alone.w.detach()
    for dim in range(3):
        halves = torch.cat([half.chunk(2, dim)[j] for half in whole.chunk(2, dim)], dim)
        other = (dim + 1) % 3
        strided = _StridedShard(dim, split_factor=2)
        cases: list[tuple[tuple[Placement, Placement], Tensor]] = [
            ((Replicate(), strided), halves),
            ((Shard(other), strided), halves.chunk(2, other)[i]),
            ((strided, Shard(dim)), whole.chunk(2, dim)[j].chunk(2, dim)[i]),
            ((strided, strided), halves.chunk(2, dim)[i]),
        ]
        for placements, wanted in cases:
            for fill in (lambda p: init_parameters(Holder(p), seed=8), lambda p: copy_shard(p, whole)):
                got = torch.full_like(wanted.contiguous(), float("nan"))
                fill(DTensor.from_local(got, mesh, placements, run_check=False, shape=shape, stride=(96, 8, 1)))
                assert torch.equal(got, wanted), (dim, placements)


def without_a_seed(mesh: DeviceMesh) -> None:
    """The default generator, alike on every rank, draws the whole."""
    for rule in ("normal", "trunc_normal"):
        for dtype in (torch.float32, torch.bfloat16):
            alone = Holder(torch.empty(6, 5, 4, dtype=dtype))
            torch.manual_seed(2)
            init_parameters(alone, rule=rule)
            holder = Holder(distribute_tensor(torch.zeros(6, 5, 4, dtype=dtype), mesh, [Shard(0), Shard(2)]))
            torch.manual_seed(2)
            init_parameters(holder, rule=rule)
            assert torch.equal(assembled("w", holder.w.detach()), alone.w)


def a_shard_of_another_size_is_an_error(mesh: DeviceMesh) -> None:
    part = torch.zeros(3, 2)
    wrong = DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=(20, 2), stride=(2, 1))
    with pytest.raises(ConfigError, match=r"\[20, 2\] laid out as .* has a shard \[3, 2\]: must be \[5, 2\]"):
        init_parameters(Holder(wrong), seed=0)
    with pytest.raises(ConfigError, match="no axis Partial"):
        init_parameters(Holder(DTensor.from_local(part, mesh, [Partial()], run_check=False)), seed=0)


class Allocated(TorchDispatchMode):
    """The most elements that tensors made inside held at one time; views and results in place cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [id(t.untyped_storage()) for t in args if isinstance(t, Tensor) and type(t) is not DTensor]
        if type(result) is Tensor and id(result.untyped_storage()) not in given:
            storage = result.untyped_storage()
            self.live[id(storage)] = result.numel()
            weakref.finalize(storage, self.live.pop, id(storage))
            self.peak = max(self.peak, sum(self.live.values()))
        return result


def only_what_is_needed_is_drawn(patch: pytest.MonkeyPatch) -> None:
    """Beside the shards never more than a block, and no block that has only other ranks' experts."""
    drawn: Counter[tuple[str, int]] = Counter()
    largest = [0]
    draw = streams.draw_block

    def counted(block: Tensor, distribution: streams.Normal, name: str, seed: int, index: int) -> None:
        drawn[name, index] += 1
        largest[0] = max(largest[0], block.numel())
        draw(block, distribution, name, seed, index)

    patch.setattr(streams, "draw_block", counted)
    for dtype in (torch.float32, torch.bfloat16):
        part = spread({"dp_replicate": 2, "dp_shard": 2, "ep": 2}, EVEN, dtype)
        for rule in RULES:
            drawn.clear()
            with Allocated() as allocated:
                init_parameters(part, seed=0, **rule)
            assert largest[0] <= streams.BLOCK_ELEMENTS
            assert allocated.peak <= streams.BLOCK_ELEMENTS, (allocated.peak, rule)
            assert set(drawn.values()) == {1}
            first = 4 * (dist.get_rank() % 2)  # experts 0 to 3, or 4 to 7
            for name, shape in (("gate_up_proj", (8, 24, 16)), ("down_proj", (8, 16, 12))):
                height = streams.BLOCK_ELEMENTS // shape[2]
                rows = range(first * shape[1], (first + 4) * shape[1])
                wanted = {row // height for row in rows}
                got = {index for parameter, index in drawn if parameter == f"layers.1.mlp.experts.{name}"}
                assert got == wanted, (name, got, wanted)
    part = spread({"dp_shard": 2, "tp": 2}, EVEN)
    with Allocated() as allocated:
        init_parameters(part, seed=0)
    assert 0 < allocated.peak <= streams.BLOCK_ELEMENTS, allocated.peak  # parts of blocks are taken
