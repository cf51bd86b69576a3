"""Whether an upcycled model computes what the dense one does, as a statement of mathematics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmoe.checkpoint.upcycle.plan import UpcyclePlan
from dmoe.config import ModelConfig
from dmoe.ops.routing import router_scores

_SAMPLES = 10_000


@dataclass(frozen=True)
class Preservation:
    """How far the layers of an upcycled model are from the dense networks, before any training."""

    kind: Literal["exact", "rounding", "no"]
    """"exact": the same function, and stored weights are those of the dense model, times powers of two; sums are taken
    in another order. "rounding": the same function, but stored weights are rounded once. "no": another function."""
    deviation: float
    """With "no", the expected root mean square of (layer - dense network), relative to the network's; else 0."""
    text: str
    """Both in words."""
    warnings: tuple[str, ...]
    """What about the start of training should be known."""


def preservation(plan: UpcyclePlan, dense: ModelConfig, dtype: torch.dtype | None = None) -> Preservation:
    """The statement for a plan and a dense model.

    Args:
        dtype: that the weights are stored in, if those of the dense model must be rounded to it. None: they need not.
    """
    plan.config(dense)
    warnings = tuple(_warnings(plan))
    if not _same_function(plan, dense.intermediate_size):
        deviation = expected_deviation(plan, dense)
        text = (
            f"not preserved ({_reason(plan)}): the output of a layer is expected to be off by {deviation:.1%} of its "
            "size, if channels are uncorrelated and inputs normalised"
        )
        return Preservation("no", deviation, text, warnings)
    scales = [plan.routed_scale(dense.intermediate_size)]
    if dense.mlp_bias:
        scales.append(scales[0] / plan.granularity)
    if dtype is not None or not all(map(_is_power_of_two, scales)):
        why = f"stored as {str(dtype).removeprefix('torch.')}" if dtype else f"down projections times {scales[0]:.6g}"
        return Preservation("rounding", 0.0, f"preserved but for the rounding of weights ({why})", warnings)
    text = "preserved exactly (weights keep their bits, or are multiplied by powers of two; sums have another order)"
    return Preservation("exact", 0.0, text, warnings)


def _same_function(plan: UpcyclePlan, width: int) -> bool:
    """The chosen experts are whole copies whose weights and factors add up to 1, and no weight was changed."""
    all_chosen = plan.top_k == plan.num_experts
    whole = plan.granularity == 1 or plan.router_init in ("normal", "zero")  # the plan allows zero only if all are
    ones = plan.norm_topk_prob or plan.router_init == "zero" or (plan.score_function == "softmax" and all_chosen)
    return whole and ones and not _changes_weights(plan, width)


def _changes_weights(plan: UpcyclePlan, width: int) -> bool:
    return plan.num_dropped(width) > 0 or (plan.method == "noise" and plan.noise_std > 0)


def _reason(plan: UpcyclePlan) -> str:
    if plan.method != "copy":
        return f"method {plan.method}"
    if plan.granularity > 1 and plan.router_init == "independent":
        return "parts of different copies are chosen together"
    return "the weights of the chosen experts do not add up to 1"


def expected_deviation(plan: UpcyclePlan, dense: ModelConfig) -> float:
    """RMS of (layer - dense network) over that of the network, for inputs of RMS 1 and uncorrelated channels.

    A channel's contribution o is there with the factor c = sum of w * scale over the chosen experts that have it, so
    the error is E[(c - 1)^2] of its energy. With A = sum of (w * scale)^2 over them and a share r drawn anew, c loses
    r of its mean and gains a variance of r * (1 - r) * A, and the new channels add r * A. Noise of relative size s on
    gate, up and down adds ((1 + s^2)^3 - 1) * A. The moments of c and A are averages over random router logits, which
    are normal with a standard deviation of router_std * sqrt(D).
    """
    width = dense.intermediate_size
    c_TG, A_TG = _factors(plan, dense.hidden_size, width)
    r = plan.num_dropped(width) / plan.expert_size(width)
    noise = (1 + plan.noise_std**2) ** 3 - 1 if plan.method == "noise" else 0.0
    share = plan.shared_share(width)
    error_TG = (c_TG * (1 - r) - (1 - share)).square() + (r * (1 - r) + r + noise) * A_TG
    return math.sqrt(error_TG.mean().item() * plan.routed_size(width) / width)


def _factors(plan: UpcyclePlan, hidden_size: int, width: int) -> tuple[Tensor, Tensor]:
    """fp64 [samples, G] both: for each part of a network, sum of w * scale and of its square over chosen experts."""
    E, k, G = plan.num_experts, plan.top_k, plan.granularity
    draw = torch.Generator().manual_seed(0)
    std = 0.0 if plan.router_init == "zero" else plan.router_std * math.sqrt(hidden_size)
    samples = max(1, min(_SAMPLES, 2**24 // (E * G)))
    if plan.router_init == "independent":
        logits_TE = torch.randn(samples, E * G, generator=draw, dtype=torch.float64) * std
    else:
        logits_TE = (torch.randn(samples, E, generator=draw, dtype=torch.float64) * std).repeat_interleave(G, dim=1)
    # The parts of a copy tie, and so are chosen together. With a zero router all tie, but then any choice is as good.
    weights_TK, ids_TK = router_scores(logits_TE, plan.score_function).topk(k * G, dim=-1)
    if plan.norm_topk_prob:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    weights_TK = weights_TK * plan.routed_scale(width)
    zeros_TG = torch.zeros(samples, G, dtype=torch.float64)
    parts_TK = ids_TK % G
    return zeros_TG.scatter_add(1, parts_TK, weights_TK), zeros_TG.scatter_add(1, parts_TK, weights_TK.square())


def _warnings(plan: UpcyclePlan) -> list[str]:
    warnings = []
    if plan.top_k * plan.granularity == 1 and plan.norm_topk_prob:
        warnings.append("with one expert a token its weight is always 1: only auxiliary losses train the router")
    if plan.router_init == "zero":
        same = plan.method == "copy" and plan.granularity == 1 and not plan.shuffle
        if plan.top_k < plan.num_experts:
            warnings.append("with router_init zero all tokens choose the same experts until the router has moved")
        if same:
            warnings.append("with router_init zero copies that are chosen together get equal gradients and stay equal")
    return warnings


def _is_power_of_two(value: float) -> bool:
    return math.frexp(value)[0] == 0.5
