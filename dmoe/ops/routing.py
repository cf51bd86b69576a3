"""Routing maths: scores, top-k choice, load-balancing loss, z-loss, counts. Pure functions of router logits.

Legend: T tokens, E experts, K picks a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops.platform import runs_triton

MIN_SUM = 1e-20
"""Bound below a sum of scores that divides: sigmoid scores can all underflow. Far below the sum of a softmax."""


def router_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Scores in (0, 1) from fp32 logits: "softmax" over the experts, or an independent "sigmoid" each."""
    if score_function == "softmax":
        return logits_TE.softmax(dim=-1)
    if score_function == "sigmoid":
        return logits_TE.sigmoid()
    raise ValueError(f"unknown score function {score_function!r}")


def choose_topk(
    scores_TE: Tensor, top_k: int, *, normalize: bool, scaling_factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The K experts of highest score and their weights.

    Args:
        normalize: divide a token's K weights by their sum.
        scaling_factor: multiplies the weights afterwards (DeepSeek-V3's routed_scaling_factor).

    Returns:
        topk_ids_TK int64, by falling score, and topk_weights_TK in the dtype of `scores_TE`.
    """
    weights_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
    if normalize:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(MIN_SUM)
    if scaling_factor != 1.0:
        weights_TK = weights_TK * scaling_factor
    return ids_TK, weights_TK


def fused_routing(logits_TE: Tensor) -> bool:
    """Whether `route` takes these logits through one Triton kernel: fp32 on a GPU, rows that fit a program."""
    return (
        logits_TE.device.type == "cuda"
        and logits_TE.dtype == torch.float32
        and logits_TE.shape[1] <= 1024
        and runs_triton(logits_TE.device)
    )


def route(
    logits_TE: Tensor, top_k: int, *, score_function: str, normalize: bool, scaling_factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`router_scores`, then `choose_topk`: scores_TE, topk_ids_TK and topk_weights_TK. One kernel on a GPU."""
    if fused_routing(logits_TE):
        from dmoe.ops.kernels.topk import route_triton

        return route_triton(
            logits_TE, top_k, score_function=score_function, normalize=normalize, scaling_factor=scaling_factor
        )
    scores_TE = router_scores(logits_TE, score_function)
    return scores_TE, *choose_topk(scores_TE, top_k, normalize=normalize, scaling_factor=scaling_factor)


def count_tokens_per_expert(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: picks each expert received. Deterministic and without a data-dependent shape."""
    chosen_TE = torch.zeros(topk_ids_TK.shape[0], num_experts, dtype=torch.bool, device=topk_ids_TK.device)
    return chosen_TE.scatter_(1, topk_ids_TK, True).sum(dim=0)


def load_balancing_loss(
    scores_TE: Tensor, tokens_per_expert_E: Tensor, top_k: int, num_tokens: Tensor | int | None = None
) -> Tensor:
    """Switch-style auxiliary loss E * sum_e f_e * P_e, without its coefficient.

    f_e is the share of the T*K picks that went to expert e (no gradient) and P_e the mean over tokens of the score of
    e, scores normalised to sum to 1 over the experts (a softmax already does; sigmoid scores are divided by their sum,
    DeepSeek-V3, arXiv:2412.19437, eq. 17-20). Equal load gives 1, all tokens on one expert up to E / K.
    Fedus et al., "Switch Transformers", arXiv:2101.03961, eq. 4-6, with f over K picks as in ST-MoE and Megatron-core.
    Hugging Face's loss does not divide by K, and pools the tokens of all layers: at equal statistics in L layers it is
    K times this one, while ours, added in every layer, comes to L times.

    Args:
        tokens_per_expert_E: picks of all tokens of the batch.
        num_tokens: tokens of the batch when `scores_TE` is a part of it, as on one of several ranks. The result is
            then this part's share: the loss of the batch is the sum over the parts.
    """
    probs_TE = normalized_scores(scores_TE)
    return balancing_loss_from_sums(probs_TE.sum(dim=0), tokens_per_expert_E, top_k, _count(scores_TE, num_tokens))


def balancing_loss_from_sums(
    prob_sums_E: Tensor, tokens_per_expert_E: Tensor, top_k: int, num_tokens: Tensor | int
) -> Tensor:
    """`load_balancing_loss` from the sums over tokens of the normalised scores."""
    num_experts = prob_sums_E.shape[0]
    share_E = tokens_per_expert_E.to(prob_sums_E.dtype) / (num_tokens * top_k)
    return num_experts * (share_E * (prob_sums_E / num_tokens)).sum()


def router_z_loss(logits_TE: Tensor, num_tokens: Tensor | int | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, without its coefficient (ST-MoE, arXiv:2202.08906, eq. 5).

    With `num_tokens`, the tokens of the whole batch, it is the share of this part of it.
    """
    return logits_TE.logsumexp(dim=-1).square().sum() / _count(logits_TE, num_tokens)


def router_entropy(scores_TE: Tensor) -> Tensor:
    """Mean over tokens of the entropy of the normalised scores, in nats; ln E means the router does not choose."""
    return torch.special.entr(normalized_scores(scores_TE)).sum() / _count(scores_TE, None)


def normalized_scores(scores_TE: Tensor) -> Tensor:
    """Scores divided by their sum over the experts."""
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(MIN_SUM)


def _count(rows: Tensor, num_tokens: Tensor | int | None) -> Tensor | int:
    # With no token the sums are over nothing and the loss is 0, not 0 / 0.
    return max(rows.shape[0], 1) if num_tokens is None else num_tokens
