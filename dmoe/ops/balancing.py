"""Keeping the load of the experts even: balancing loss, z-loss, entropy, sums by sequence, the bias of the choice.

Legend: T tokens, E experts, K picks a token, B sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config import require

MIN_SUM = 1e-20
"""Bound below a sum of scores that divides: sigmoid scores can all underflow. Far below the sum of a softmax."""


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
    """`load_balancing_loss` from the sums over tokens of the normalised scores.

    With sums and counts [B, E] of B sequences (`sums_by_sequence`, `count_tokens_by_sequence`) and the number of tokens
    of one, it is the sum of the losses of the sequences; their mean is the sequence-wise loss of DeepSeek-V3
    (arXiv:2412.19437, eq. 17-20).
    """
    num_experts = prob_sums_E.shape[-1]
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


def sums_by_sequence(values_TE: Tensor, num_sequences: int) -> Tensor:
    """[B, E]: sums over the tokens of each of B sequences of equal length, whose rows follow each other.

    Raises:
        ConfigError: the rows are no multiple of the sequences.
    """
    num_tokens = values_TE.shape[0]
    length = num_tokens // max(num_sequences, 1)
    if num_sequences * length != num_tokens:
        require(False, "num_sequences", num_sequences, f"a divisor of the {num_tokens} tokens")
    return values_TE.unflatten(0, (num_sequences, length)).sum(dim=1)


def expert_bias_update(bias_E: Tensor, tokens_per_expert_E: Tensor, rate: float) -> Tensor:
    """The next bias of the choice: b_e + rate * sign(mean of n - n_e), then shifted to mean 0.

    Experts with fewer picks than the mean become likelier, without a loss (Wang et al., "Auxiliary-loss-free load
    balancing", arXiv:2408.15664, algorithm 1). The shift changes no choice, as only differences of biases count, and
    keeps the bias from drifting.

    Args:
        bias_E: floating point; not changed.
        tokens_per_expert_E: picks of the whole batch, whole numbers of any dtype that holds them.
        rate: step, 0.001 in the paper.
    """
    counts_E = tokens_per_expert_E.to(torch.int64)
    # Whole numbers, so that an expert with exactly the mean does not move.
    direction_E = (counts_E.sum() - counts_E * counts_E.numel()).sign()
    bias_E = bias_E + rate * direction_E.to(bias_E.dtype)
    return bias_E - bias_E.mean()
