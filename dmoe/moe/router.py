"""The router: one linear map to a logit per expert, and the choice of the top k."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.moe.sharded import replicated
from dmoe.ops.precision import autocast_off
from dmoe.ops.routing import route


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    topk_ids_TK: Tensor
    """int64 expert ids, by falling score."""
    topk_weights_TK: Tensor
    """fp32 weights of those experts."""
    logits_TE: Tensor
    """fp32 logits."""
    scores_TE: Tensor
    """fp32 scores over all experts."""


class Router(nn.Module):
    """Token-choice top-k router. `weight` is [E, D].

    Logits, scores and weights are computed in fp32 whatever the dtype of the model or of autocast: a rounded logit
    changes which expert is chosen.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor) -> Routing:
        config = self.config
        wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        with autocast_off(x_TD):
            logits_TE = F.linear(x_TD.to(wide), replicated(self.weight).to(wide))
            scores_TE, ids_TK, weights_TK = route(
                logits_TE,
                config.top_k,
                score_function=config.score_function,
                normalize=config.norm_topk_prob,
                scaling_factor=config.routed_scaling_factor,
            )
        return Routing(ids_TK, weights_TK, logits_TE, scores_TE)

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.hidden_size} -> {c.num_experts}, top_k={c.top_k}, score_function={c.score_function}"
