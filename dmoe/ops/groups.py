"""Limiting a token's experts to a few groups of them, so that it travels to few devices or nodes."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config import require


def limit_to_groups(scores_TE: Tensor, n_group: int, topk_group: int, group_score_top: int) -> Tensor:
    """`scores_TE` with -inf for the experts outside each token's best groups.

    Experts are n_group groups of neighbours. The score of a group is the sum of its `group_score_top` highest scores: 1
    is DeepSeek-V2 (arXiv:2405.04434, section 2.1.2), 2 is DeepSeek-V3 (arXiv:2412.19437, section 2.1.2).

    Args:
        scores_TE: what experts are chosen by, with the bias of the choice if there is one.
        topk_group: groups that a token may use, from 1 to n_group.
        group_score_top: from 1 to the size of a group.

    Raises:
        ConfigError: a number is out of range or n_group does not divide the experts.
    """
    num_experts = scores_TE.shape[1]
    if n_group < 1 or num_experts % n_group:
        require(False, "n_group", n_group, f"a divisor of the {num_experts} experts")
    size = num_experts // n_group
    if not 1 <= topk_group <= n_group:
        require(False, "topk_group", topk_group, f"from 1 to n_group ({n_group})")
    if not 1 <= group_score_top <= size:
        require(False, "group_score_top", group_score_top, f"from 1 to the {size} experts of a group")
    by_group = scores_TE.unflatten(1, (n_group, size))
    group_scores = by_group.topk(group_score_top, dim=-1).values.sum(dim=-1)
    best_groups = group_scores.topk(topk_group, dim=-1).indices
    allowed = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, best_groups, True)
    return by_group.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(1)
