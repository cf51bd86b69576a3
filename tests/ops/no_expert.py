"""Problems in which picks are of no expert, and what the oracle says about them. For tests of every backend."""

from dataclasses import replace
from typing import Any

import torch
from dense_oracle import Problem, dense_gradients
from torch import Tensor

KINDS = ("none", "some", "one expert", "all")
"""Which picks are dropped: about 30 %, of several tokens all of them; those of expert 0; every one."""


def drop(p: Problem, kind: str) -> tuple[Problem, Problem]:
    """The problem with picks of no expert, twice: with NaN as their weights and in tokens without an expert, and with
    zeros there."""
    num_experts = p.down.shape[0]
    if kind == "some":
        lost = torch.rand(p.topk_ids.shape) < 0.2
        lost[:1], lost[-1:], lost[2:4] = True, True, True
        lost[1:2] = False
    else:
        lost = {"none": p.topk_ids < 0, "one expert": p.topk_ids == 0, "all": p.topk_ids >= 0}[kind]
    p = replace(p, topk_ids=p.topk_ids.masked_fill(lost, num_experts))
    without_expert = lost.all(dim=1, keepdim=True)

    def filled(value: float) -> Problem:
        x, weights = p.x.masked_fill(without_expert, value), p.topk_weights.masked_fill(lost, value)
        return replace(p, x=x, topk_weights=weights)

    return filled(float("nan")), filled(0.0)


def kept(p: Problem) -> int:
    """Picks of an expert."""
    return int((p.topk_ids < p.down.shape[0]).sum())


def dropped_gradient(p: Problem, value: float) -> Tensor:
    """A gradient of the output, with `value` for tokens without an expert."""
    grad = torch.randn(p.x.shape).to(p.x.dtype)
    return grad.masked_fill((p.topk_ids == p.down.shape[0]).all(dim=1, keepdim=True), value)


def gradients_with_drops(clean: Problem, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The dense oracle with one expert more, of zeros, that those picks go to."""
    names = ("gate_up", "down", "gate_up_bias", "down_bias")
    more: dict[str, Any] = {}
    for name in names:
        if (t := getattr(clean, name)) is not None:
            more[name] = torch.cat([t, torch.zeros_like(t[:1])])
    y, grads = dense_gradients(replace(clean, **more), grad)
    return y, {name: g[:-1] if name in names else g for name, g in grads.items()}
