"""The learned router, and the z-loss of its logits.

Legend: T tokens, E experts, K picks a token, D width.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.compat.megablocks.layers import common
from dmoe.compat.megablocks.layers.arguments import Arguments, uses_expert_choice, uses_paired_zloss
from dmoe.config import require
from dmoe.moe.recompute import recomputing
from dmoe.ops import router_z_loss, uniform_assignment

_ROUTER_LOGITS: list[Tensor] = []


def _save_router_logits(logits_TE: Tensor, args: Arguments) -> None:
    if args.moe_zloss_weight and not recomputing():
        _ROUTER_LOGITS.append(logits_TE)


def clear_router_zloss() -> None:
    """Forget the saved logits. Call once a step, or they pile up."""
    _ROUTER_LOGITS.clear()


def batched_router_zloss(args: Arguments) -> Tensor | int:
    """moe_zloss_weight times the mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv:2202.08906, eq. 5).

    Returns:
        [layers that ran in training mode since `clear_router_zloss`]: sum it to add it to a loss. In fp32 with
        `moe_zloss_in_fp32`. 0, with a warning, if the weight is 0.

    Raises:
        ConfigError: no layer has run in training mode.
    """
    if not args.moe_zloss_weight:
        warnings.warn("batched_router_zloss: moe_zloss_weight is 0, so there is no z-loss", stacklevel=2)
        return 0
    require(len(_ROUTER_LOGITS) > 0, "number of saved router logits", 0, "at least 1: run the layers in training mode")
    logits = [t.float() if args.moe_zloss_in_fp32 else t for t in _ROUTER_LOGITS]
    return args.moe_zloss_weight * torch.stack([router_z_loss(t) for t in logits])


class LearnedRouter(nn.Module):
    """Softmax over the experts, then the K largest. Parameter: `layer.weight` [E, D], the same on all ranks."""

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.layer = nn.Linear(
            args.hidden_size, args.moe_num_experts, bias=False, dtype=common.dtype(args), device=args.device
        )
        args.init_method(self.layer.weight)

    def jitter(self, x: Tensor) -> Tensor:
        """Noise of the shape of `x`, uniform in [1 - eps, 1 + eps]."""
        eps = self.args.moe_jitter_eps
        assert eps is not None
        low, high = 1.0 - eps, 1.0 + eps
        noise = torch.rand(x.shape, dtype=x.dtype, device=x.device)
        return low + noise * (high - low)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Route `x` of shape [..., D].

        Returns:
            scores [T, E], and [T, K] the weights and the experts (int64) of each token's picks. With the z-loss of the
            fork (`arguments.uses_paired_zloss`) the logits [T, E] come second. When experts choose tokens, the last
            two are [sequences, E, C], or [E, C] over the whole batch, and hold positions of tokens instead of experts.

        Raises:
            ConfigError: experts choose tokens, and `x` is not [sequences, tokens, D] or has too few tokens.
        """
        args = self.args
        if self.training and args.moe_jitter_eps is not None:
            x = x * self.jitter(x)
        logits_TE = self.layer(x.reshape(-1, x.shape[-1]))
        scores_TE = logits_TE.softmax(dim=-1)
        weights, indices = self._choose(scores_TE, x.shape)
        if args.moe_normalize_expert_weights:
            norm = torch.linalg.vector_norm(weights, ord=args.moe_normalize_expert_weights, dim=-1, keepdim=True)
            weights = weights / norm
        if args.uniform_expert_assignment:
            indices = uniform_assignment(len(indices), args.moe_num_experts, args.moe_top_k, indices.device)
        if uses_paired_zloss(args):
            return scores_TE, logits_TE, weights, indices
        if self.training:
            _save_router_logits(logits_TE, args)
        return scores_TE, weights, indices

    def _choose(self, scores_TE: Tensor, shape: torch.Size) -> Any:
        args = self.args
        if uses_expert_choice(args):
            return _choose_tokens(scores_TE, shape, args)
        # The two break ties differently.
        if args.moe_top_k == 1:
            return scores_TE.max(dim=-1, keepdim=True)
        return scores_TE.topk(args.moe_top_k, dim=-1)


def _choose_tokens(scores_TE: Tensor, shape: torch.Size, args: Arguments) -> Any:
    """The C tokens that each expert takes, C = top_k * tokens / experts (Zhou et al., arXiv:2202.09368, eq. 1)."""
    scores_ET = scores_TE.t()
    if not args.moe_expert_choice_grouped:
        require(len(shape) == 3, "shape of x", tuple(shape), "[sequences, tokens, width] with moe_expert_choice")
        scores_ET = scores_TE.view(*shape[:2], scores_TE.shape[1]).transpose(1, 2)
    num_tokens = scores_ET.shape[-1]
    capacity = args.moe_top_k * num_tokens // args.moe_num_experts
    require(
        capacity > 0 or num_tokens == 0, "number of tokens", num_tokens,
        f"at least moe_num_experts / moe_top_k, {args.moe_num_experts} / {args.moe_top_k}, for experts to choose from",
    )  # fmt: skip
    return scores_ET.topk(capacity, dim=-1)
