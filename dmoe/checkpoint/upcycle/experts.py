"""The weights of one expert, from those of the dense network; and the random numbers of upcycling.

A network's channel j is row j of its gate and up projection and column j of its down projection. What is random about
an expert is drawn from a generator of its own, seeded by names and numbers, so that any expert can be made alone.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.checkpoint.upcycle.plan import UpcyclePlan


class Channels(NamedTuple):
    """Which of the dense network's channels an expert has."""

    indices_F: Tensor
    """int64: for each channel of the expert, its number in the dense network."""
    dropped_N: Tensor
    """int64: those of the expert's channels, numbered in the expert, that are drawn anew."""


def generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator whose stream depends on the arguments alone."""
    digest = hashlib.sha256(":".join(map(str, (seed, "upcycle", *names))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def expert_channels(plan: UpcyclePlan, width: int, layer: int, expert: int) -> Channels:
    """The channels of expert c * G + g of a layer: part g of copy c of a dense network of this width."""
    copy, part = divmod(expert, plan.granularity)
    routed, size = plan.routed_size(width), plan.expert_size(width)
    first = width - routed  # the shared expert has those before it
    if plan.shuffle:
        order = torch.randperm(routed, generator=generator(plan.seed, layer, "order", copy))
        indices_F = first + order[part * size : (part + 1) * size]
    else:
        indices_F = torch.arange(first + part * size, first + (part + 1) * size)
    drawn = torch.randperm(size, generator=generator(plan.seed, layer, "dropped", expert))
    return Channels(indices_F, drawn[: plan.num_dropped(width)].sort().values)


def expert_matrix(
    plan: UpcyclePlan, dense: Tensor, channels: Channels, *, dim: int, scale: float, std: float, draw: torch.Generator
) -> Tensor:
    """One matrix of an expert, in the dtype of the dense one.

    Args:
        dense: the dense network's matrix, or bias over channels.
        dim: its dim of channels: 0 of gate and up projection, 1 of the down projection.
        scale: factor on the result, before it is rounded to the dtype.
        std: of the whole dense matrix, the unit of the noise.
        draw: where what is drawn anew and noise come from.
    """
    chosen = dense.index_select(dim, channels.indices_F)
    if scale == 1 and plan.method == "copy":
        return chosen
    wide = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    if plan.method == "drop" and channels.dropped_N.numel():
        _draw_anew(wide, channels.dropped_N, dim, draw)
    if plan.method == "noise":
        wide = wide.add(torch.empty_like(wide).normal_(generator=draw), alpha=plan.noise_std * std)
    return (wide * scale).to(dense.dtype)


def _draw_anew(matrix: Tensor, dropped_N: Tensor, dim: int, draw: torch.Generator) -> None:
    """Replace channels by normal numbers with the mean and standard deviation of all that they held."""
    old = matrix.index_select(dim, dropped_N)
    mean, std = old.mean(dtype=torch.float64).item(), old.std(correction=0).item()
    matrix.index_copy_(dim, dropped_N, torch.empty_like(old).normal_(mean, std, generator=draw))


def expert_bias(dense: Tensor, channels: Channels) -> Tensor:
    """A gate or up bias of an expert: 0 in channels that are drawn anew."""
    return dense.index_select(0, channels.indices_F).index_fill_(0, channels.dropped_N, 0.0)


def router_rows(plan: UpcyclePlan, hidden_size: int, layer: int) -> Tensor:
    """fp32 [E * G, D]: the router's initial weight."""
    rows = plan.num_experts * (plan.granularity if plan.router_init == "independent" else 1)
    draw = generator(plan.seed, layer, "router")
    if plan.router_init == "zero":
        weight = torch.zeros(rows, hidden_size)
    else:
        weight = torch.empty(rows, hidden_size).normal_(std=plan.router_std, generator=draw)
    return weight.repeat_interleave(plan.num_experts * plan.granularity // rows, dim=0)
