"""A small model of plain modules, laid out by hand in every way a run may be, for the tests of resharding."""

from __future__ import annotations

import zlib

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

V, D, E, F, LAYERS = 11, 4, 6, 5, 4  # F is odd over 2, E is uneven over 4, V over 2


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F, D))
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * F))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, 8)
        self.o_proj = nn.Linear(8, D, bias=False)
        self.experts = Experts()


class Part(nn.Module):
    """The layers `held` of the model, the embedding if it holds the first or the last one, the head if the last."""

    def __init__(self, held: list[int]) -> None:
        super().__init__()
        if {0, LAYERS - 1} & set(held):
            self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleDict({str(i): Layer() for i in held})
        if LAYERS - 1 in held:
            self.norm = nn.LayerNorm(D)
            self.norm.bias.requires_grad_(False)
            self.lm_head = nn.Linear(D, V, bias=False)
            self.lm_head.weight = self.embed_tokens.weight
            self.register_buffer("seen", torch.zeros(3))


# layout -> world size, and how `lay_out` reads it
LAYOUTS: dict[str, dict] = {
    "fsdp2_tp2": {"world": 4, "fsdp": 2, "tp": 2},
    "hsdp2x2": {"world": 4, "replicate": 2, "fsdp": 2},
    "fsdp4": {"world": 4, "fsdp": 4},
    "fsdp4_ep2": {"world": 4, "fsdp": 4, "ep": 2},
    "ep2_replicate2": {"world": 4, "fsdp": 2, "replicate": 2, "ep": 2},
    "pp2_fsdp2": {"world": 4, "pp": 2, "fsdp": 2, "stages": [[[0, 1]], [[2, 3]]]},
    "pp2_tp2": {"world": 4, "pp": 2, "tp": 2, "fsdp": 1, "stages": [[[0], [2]], [[1], [3]]]},
    "tp2": {"world": 2, "fsdp": 1, "tp": 2},
    "fsdp2": {"world": 2, "fsdp": 2},
    "pp2_v": {"world": 2, "pp": 2, "stages": [[[0], [3]], [[1], [2]]]},  # both copies of the embedding on rank 0
    "one": {"world": 1},
}


def full_value(name: str, shape: torch.Size, what: str) -> torch.Tensor:
    seed = zlib.crc32(f"{name} {what}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def part_of(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of `full` if it is laid out as `like`: the last axes of the mesh split first."""
    if not isinstance(like, DTensor):
        return full
    mesh, part = like.device_mesh, full
    for axis in reversed(range(mesh.ndim)):
        placement, index, count = like.placements[axis], mesh.get_local_rank(axis), mesh.size(axis)
        if placement.is_replicate():
            continue
        if placement.dim == 1 and getattr(placement, "split_factor", 1) == 2:
            part = torch.cat([_chunk(half, 1, index, count) for half in part.chunk(2, 1)], 1)
        else:
            part = _chunk(part, placement.dim, index, count)
    return part


def _chunk(tensor: torch.Tensor, dim: int, index: int, count: int) -> torch.Tensor:
    step = -(-tensor.shape[dim] // count)
    start = min(index * step, tensor.shape[dim])
    return tensor.narrow(dim, start, min(step, tensor.shape[dim] - start))


def lay_out(layout: dict, what: str) -> tuple[list[nn.Module], torch.optim.Optimizer]:
    """The parts of this rank, with values of the stream `what`, and their optimiser before its first step."""
    axes = {"pp": layout.get("pp", 1), "replicate": layout.get("replicate", 1), "fsdp": layout.get("fsdp", 1)}
    axes["tp"] = layout.get("tp", 1)
    stage, dense, experts = 0, None, None
    if layout["world"] > 1:
        dense = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes))
        stage = dense.get_local_rank("pp")
    if "ep" in layout:
        sizes = (1, axes["replicate"], axes["fsdp"] // layout["ep"], layout["ep"])
        experts = init_device_mesh("cpu", sizes, mesh_dim_names=("pp", "replicate", "fsdp", "ep"))
    parts: list[nn.Module] = []
    for held in layout.get("stages", [[list(range(LAYERS))]])[stage]:
        part = Part(held)
        with torch.no_grad():
            for name, tensor in part.named_parameters():
                tensor.copy_(full_value(name, tensor.shape, what))
            if hasattr(part, "seen"):
                part.seen.copy_(full_value("seen", part.seen.shape, what))
        if dense is not None:
            _shard(part, dense, experts)
        parts.append(part)
    trained = [p for part in parts for p in part.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1]},
        {"params": [p for p in trained if p.ndim == 1], "lr": 0.5},
    ]
    return parts, torch.optim.AdamW(groups, lr=0.1, foreach=False)


def _shard(part: nn.Module, dense: DeviceMesh, experts: DeviceMesh | None) -> None:
    if dense["tp"].size() > 1:
        tp = dense["tp"]
        if hasattr(part, "embed_tokens"):
            _place(part.embed_tokens, "weight", tp, Shard(1))
            if hasattr(part, "lm_head"):
                part.lm_head.weight = part.embed_tokens.weight
        for layer in part.layers.values():
            _place(layer.q_proj, "weight", tp, Shard(0))
            _place(layer.q_proj, "bias", tp, Shard(0))
            _place(layer.o_proj, "weight", tp, Shard(1))
            _place(layer.experts, "gate_up_proj", tp, _StridedShard(1, split_factor=2))
            _place(layer.experts, "gate_up_bias", tp, _StridedShard(1, split_factor=2))
            _place(layer.experts, "down_proj", tp, Shard(2))
    replicated = dense["replicate"].size() > 1
    for layer in part.layers.values():
        if experts is not None:
            for name in ("gate_up_proj", "gate_up_bias", "down_proj"):
                _place(layer.experts, name, experts["ep"], Shard(0))
            fully_shard(layer.experts, mesh=experts["replicate", "fsdp"] if replicated else experts["fsdp"])
        if dense["fsdp"].size() > 1:
            fully_shard(layer, mesh=dense["replicate", "fsdp"] if replicated else dense["fsdp"])
    if dense["fsdp"].size() > 1:
        fully_shard(part, mesh=dense["replicate", "fsdp"] if replicated else dense["fsdp"])


def _place(module: nn.Module, name: str, mesh: DeviceMesh, placement: object) -> None:
    full = getattr(module, name).detach()
    outline = DTensor.from_local(full, mesh, [placement], run_check=False, shape=full.shape, stride=full.stride())
    setattr(module, name, nn.Parameter(laid_out_as(full, outline)))


def laid_out_as(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    part = part_of(full, like).clone()
    if not isinstance(like, DTensor):
        return part
    stride = full.contiguous().stride()
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=full.shape, stride=stride
    ).detach()


def train(parts: list[nn.Module], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps with gradients that are functions of the name, in the layout of the parameter."""
    for step in range(steps):
        for part in parts:
            for name, p in part.named_parameters():
                if p.requires_grad:
                    p.grad = laid_out_as(full_value(name, p.shape, f"gradient {step}"), p)
        optimizer.step()


def everything(parts: list[nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Weights, buffers, moments and step counts of this rank by name, without the code under test."""
    found: dict[str, torch.Tensor] = {}
    for index, part in enumerate(parts):
        for name, tensor in [*part.named_parameters(remove_duplicate=False), *part.named_buffers()]:
            found[f"{index} {name}"] = tensor.detach()
        for name, p in part.named_parameters():
            for key, value in optimizer.state.get(p, {}).items():
                found[f"{index} {name} {key}"] = value
    return found
