"""Which experts a token goes to: scores, top-k choice, weights, counts. Pure functions of router logits.

Losses are in `balancing.py`, rules that need no logits in `assignments.py`.
Legend: T tokens, E experts, K picks a token, B sequences. The id E stands for "no expert".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.config import require
from dmoe.ops.balancing import MIN_SUM, sums_by_sequence
from dmoe.ops.groups import limit_to_groups
from dmoe.ops.platform import runs_triton

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


def router_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Scores from fp32 or fp64 logits, none negative.

    "softmax" over the experts; an independent "sigmoid" each; or "sqrtsoftplus", sqrt(ln(1 + exp(logit))), of
    DeepSeek-V4 and Megatron-core, which has no upper bound.

    Raises:
        ConfigError: another name.
    """
    require(score_function in SCORE_FUNCTIONS, "score_function", score_function, f"one of {', '.join(SCORE_FUNCTIONS)}")
    if score_function == "softmax":
        return logits_TE.softmax(dim=-1)
    if score_function == "sigmoid":
        return logits_TE.sigmoid()
    return _sqrt_softplus(logits_TE)


def _sqrt_softplus(logits_TE: Tensor) -> Tensor:
    # Far below zero it is exp(l / 2) to the last bit, also where exp(l) underflows: a root has no gradient at 0. Each
    # branch sees only logits that it is made for, because the gradient of the other one is 0 times its derivative.
    near = F.softplus(logits_TE.clamp_min(-40.0), threshold=40.0).sqrt()
    return torch.where(logits_TE < -40.0, (logits_TE.clamp_max(-40.0) / 2).exp(), near)


def choose_topk(
    scores_TE: Tensor,
    top_k: int,
    *,
    normalize: bool,
    scaling_factor: float = 1.0,
    bias_E: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score_top: int = 0,
) -> tuple[Tensor, Tensor]:
    """The K experts of highest score and their weights.

    Args:
        normalize: divide a token's K weights by their sum.
        scaling_factor: multiplies the weights afterwards (DeepSeek-V3's routed_scaling_factor).
        bias_E: added to the scores for the choice alone; the weights are scores without it, and it gets no gradient.
        n_group, topk_group: only experts of a token's `topk_group` best groups out of `n_group` may be chosen
            (`limit_to_groups`, on the scores with their bias).
        group_score_top: highest scores that make up the score of a group. 0: K / topk_group rounded down, at least 1,
            as in Megatron-core.

    Returns:
        topk_ids_TK int64, by falling score (with its bias), and topk_weights_TK in the dtype of `scores_TE`. Which of
        equal scores is chosen is not defined.

    Raises:
        ConfigError: a number is out of range.
    """
    ids_TK, weights_TK = _choose(scores_TE, top_k, bias_E, n_group, topk_group, group_score_top)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(MIN_SUM)
    return ids_TK, _scaled(weights_TK, scaling_factor)


def _choose(
    scores_TE: Tensor, top_k: int, bias_E: Tensor | None, n_group: int, topk_group: int, group_score_top: int
) -> tuple[Tensor, Tensor]:
    """Ids of the K experts, and their scores without the bias."""
    num_experts = scores_TE.shape[1]
    if not 1 <= top_k <= num_experts:
        require(False, "top_k", top_k, f"from 1 to the {num_experts} experts")
    if bias_E is None and n_group == 1:
        scores_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
        return ids_TK, scores_TK
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E.detach()
    if n_group != 1:
        group_score_top = group_score_top or max(1, top_k // max(1, topk_group))
        choice_TE = limit_to_groups(choice_TE, n_group, topk_group, group_score_top)
        allowed = topk_group * (num_experts // n_group)
        if top_k > allowed:
            require(False, "top_k", top_k, f"at most {allowed}, the experts of topk_group ({topk_group}) groups")
    ids_TK = choice_TE.topk(top_k, dim=-1).indices
    return ids_TK, scores_TE.gather(1, ids_TK)


def _scaled(weights_TK: Tensor, scaling_factor: float) -> Tensor:
    return weights_TK if scaling_factor == 1.0 else weights_TK * scaling_factor


def fused_routing(logits_TE: Tensor) -> bool:
    """Whether one Triton kernel can score and choose from these logits: fp32 on a GPU, rows that fit a program."""
    return (
        logits_TE.device.type == "cuda"
        and logits_TE.dtype == torch.float32
        and logits_TE.shape[1] <= 1024
        and runs_triton(logits_TE.device)
    )


def route(
    logits_TE: Tensor,
    top_k: int,
    *,
    score_function: str,
    normalize: bool,
    scaling_factor: float = 1.0,
    softmax_after_topk: bool = False,
    bias_E: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score_top: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`router_scores`, then `choose_topk`: scores_TE, topk_ids_TK and topk_weights_TK. No host synchronisation.

    One kernel on a GPU, if neither a bias, groups nor `softmax_after_topk` are asked for and the scores are softmax or
    sigmoid.

    Args:
        softmax_after_topk: choose by the logits (with `bias_E` and groups, if given) and weigh by a softmax over the K
            chosen logits, as Mixtral and gpt-oss are written. Their sum is 1: `normalize` has nothing to do, and with
            K = 1 the weight is 1 and the router has no gradient from it. The scores are the softmax over all experts,
            so `score_function` must be "softmax".

    Raises:
        ConfigError: an unknown score function, or a number out of range.
    """
    plain = bias_E is None and n_group == 1 and not softmax_after_topk
    if plain and score_function in ("softmax", "sigmoid") and fused_routing(logits_TE):
        from dmoe.ops.kernels.topk import route_triton

        return route_triton(
            logits_TE, top_k, score_function=score_function, normalize=normalize, scaling_factor=scaling_factor
        )
    scores_TE = router_scores(logits_TE, score_function)
    if softmax_after_topk:
        require(score_function == "softmax", "score_function", score_function, '"softmax" with softmax_after_topk')
        ids_TK, chosen_TK = _choose(logits_TE, top_k, bias_E, n_group, topk_group, group_score_top)
        return scores_TE, ids_TK, _scaled(chosen_TK.softmax(dim=-1), scaling_factor)
    choice = choose_topk(
        scores_TE, top_k, normalize=normalize, scaling_factor=scaling_factor, bias_E=bias_E, n_group=n_group,
        topk_group=topk_group, group_score_top=group_score_top,
    )  # fmt: skip
    return scores_TE, *choice


def count_tokens_per_expert(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: picks each expert received; the id E counts for none. Deterministic, no data-dependent shape."""
    return _chosen(topk_ids_TK, num_experts).sum(dim=0)[:num_experts]


def count_tokens_by_sequence(topk_ids_TK: Tensor, num_experts: int, num_sequences: int) -> Tensor:
    """int64 [B, E]: `count_tokens_per_expert` of each of B sequences of equal length, whose rows follow each other."""
    return sums_by_sequence(_chosen(topk_ids_TK, num_experts), num_sequences)[:, :num_experts]


def _chosen(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """bool, [T, more than E columns]: whether expert e is among a token's picks. Column E holds the id E."""
    columns = (num_experts // 4 + 1) * 4  # a multiple of 4, so that a reduction over rows reads 4 columns at a time
    chosen = torch.zeros(topk_ids_TK.shape[0], columns, dtype=torch.bool, device=topk_ids_TK.device)
    return chosen.scatter_(1, topk_ids_TK, True)
