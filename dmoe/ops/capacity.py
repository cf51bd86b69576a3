"""A limit on the tokens of an expert: picks over it go to no expert. Dropless layers do not need it.

Legend: T tokens, E experts, K picks a token, R = T*K picks. The id E stands for "no expert".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmoe.config import require

POLICIES = ("position", "probs")


def capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Tokens an expert may take: ceil(T * K / E * factor), at least 1 and at most T (Switch, arXiv:2101.03961, eq. 3).

    Raises:
        ConfigError: the factor is not a positive finite number.
    """
    require(0 < factor < math.inf, "capacity factor", factor, "a finite number greater than 0")
    # What floating point leaves above a whole number must not become one token more: 100 / 10 * 1.1 is 11, not 12.
    tokens = math.ceil(num_tokens * top_k * factor / num_experts * (1 - 1e-12))
    return min(num_tokens, max(1, tokens))


def keep_within_capacity(
    topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_experts: int, capacity: int, policy: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the picks over an expert's capacity.

    No host synchronisation and no data-dependent shape; memory of the order of the picks and the experts.

    Args:
        topk_ids_TK: int64 or int32 in [0, E]. A pick with the id E goes to no expert: it stays as it is, takes no
            room and does not count as dropped.
        policy: which picks an expert keeps: "position", the first in the order of tokens, then of k; "probs", those of
            highest weight, of equal ones the earlier.

    Returns:
        ids and weights in which a dropped pick has the id E and the weight 0, through which no gradient flows, while
        the others keep their weight; and the number of dropped picks, an int64 scalar on the same device.

    Raises:
        ConfigError: an unknown policy.
    """
    require(policy in POLICIES, "policy", policy, f"one of {', '.join(POLICIES)}")
    ids_R = topk_ids_TK.reshape(-1)
    if policy == "position":
        sorted_ids_R, order_R = ids_R.sort(stable=True)
    else:
        by_weight_R = topk_weights_TK.detach().reshape(-1).sort(descending=True, stable=True).indices
        sorted_ids_R, by_expert_R = ids_R[by_weight_R].sort(stable=True)
        order_R = by_weight_R[by_expert_R]
    # The place of a pick among those of its expert: its place among all, less those of the experts before.
    firsts = torch.searchsorted(sorted_ids_R, torch.arange(num_experts + 1, device=ids_R.device, dtype=ids_R.dtype))
    places_R = torch.arange(ids_R.numel(), device=ids_R.device) - firsts[sorted_ids_R]
    keep_sorted_R = (places_R < capacity) | (sorted_ids_R == num_experts)
    keep_TK = torch.empty_like(keep_sorted_R).scatter_(0, order_R, keep_sorted_R).view_as(topk_ids_TK)
    dropped = keep_TK.logical_not().sum()
    return topk_ids_TK.where(keep_TK, num_experts), topk_weights_TK.where(keep_TK, 0.0), dropped
