"""The router: one linear map to a logit per expert, and the choice of experts by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.errors import ConfigError
from dmoe.moe.sharded import replicated
from dmoe.moe.slots import Slots, slots_of_picks
from dmoe.ops.assignments import hash_assignment, random_assignment, uniform_assignment
from dmoe.ops.balancing import MIN_SUM
from dmoe.ops.capacity import capacity, keep_within_capacity
from dmoe.ops.expert_choice import expert_choice
from dmoe.ops.precision import autocast_off
from dmoe.ops.routing import count_tokens_per_expert, route, router_scores
from dmoe.ops.sinkhorn import sinkhorn
from dmoe.ops.sparsemixer import sparsemixer


class Routing(NamedTuple):
    """What the router decided for T tokens."""

    topk_ids_TK: Tensor
    """int64 expert ids, by falling score where the best are chosen; E for a pick that goes to no expert."""
    topk_weights_TK: Tensor
    """Weights of those experts; like logits and scores in fp32 or, see `Router`, fp64."""
    logits_TE: Tensor
    scores_TE: Tensor
    """Scores over all experts."""
    valid_T: Tensor | None = None
    """Which tokens are no padding. None: all."""
    undropped_ids_TK: Tensor | None = None
    """The ids before picks over capacity were dropped. None: none was."""
    dropped: Tensor | None = None
    """int64 scalar: picks over capacity."""
    slots: Slots | None = None
    """Where experts take a fixed number of tokens. With routing "expert_choice" they are all there is: ids and weights
    are [T, 0]."""
    even: bool = False
    """Rows of slots with one pick each, sorted by expert, equally many for each expert and on every rank."""

    def tokens_per_expert(self) -> Tensor:
        """int64 [E]: picks of each expert, dropped ones too; the load that balancing looks at."""
        if self.slots is not None and self.slots.picks_TK is None:
            return (self.slots.tokens_EC < self.scores_TE.shape[0]).sum(dim=1)
        return count_tokens_per_expert(self.ids_before_drop, self.scores_TE.shape[1])

    @property
    def ids_before_drop(self) -> Tensor:
        """[T, K]: the ids whether or not they were within capacity."""
        return self.topk_ids_TK if self.undropped_ids_TK is None else self.undropped_ids_TK


class Router(nn.Module):
    """Chooses experts for tokens. `weight` is [E, D], `bias` [E] if the config has one.

    Logits, scores and weights are computed in fp32 (or fp64, `config.router_dtype`) whatever the dtype of the model or
    of autocast: a rounded logit changes which expert is chosen.

    Buffer: `e_score_correction_bias` [E], the bias of the choice with `config.expert_bias_rate`. It is part of the
    state dict and fp32 whatever the dtype of the model; `dmoe.moe.LoadBalancer` moves it.

    `replay`, if set, sees the chosen ids and may return others (`dmoe.moe.replay`). `hash_seed` tells layers with
    routing "hash" apart; a `Decoder` sets it to the layer's index.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        E = config.num_experts
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(E, device=device, dtype=dtype)) if config.router_bias else None
        )
        # Not in the dtype of the model: steps of 0.001 would be lost in bf16.
        bias = torch.zeros(E, device=device, dtype=torch.float32) if config.expert_bias_rate > 0 else None
        self.register_buffer("e_score_correction_bias", bias)
        self.replay: Callable[[Tensor], Tensor] | None = None
        self.hash_seed = 0

    def reset_buffers(self) -> None:
        """Set the bias of the choice to 0."""
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        kept = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if kept is not None and moved is not None and moved.dtype != kept.dtype:
            self.e_score_correction_bias = kept.to(moved.device)
        return self

    def forward(
        self,
        x_TD: Tensor,
        valid_T: Tensor | None = None,
        token_ids_T: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> Routing:
        """Route T tokens.

        Args:
            valid_T: bool, False for padding, which goes to no expert. None: no padding.
            token_ids_T: ids of the tokens, for routing "hash".
            group: ranks whose tokens are one batch, for routing "sinkhorn".
        """
        with autocast_off(x_TD):
            logits_TE = self._logits(x_TD)
            if self.config.routing == "expert_choice":
                return self._expert_choice(logits_TE, valid_T)
            scores_TE, ids_TK, weights_TK = self._choose(logits_TE, token_ids_T, valid_T, group)
            if self.replay is not None:
                ids_TK = self.replay(ids_TK)
                weights_TK = self._weights(logits_TE, scores_TE, ids_TK)
            if valid_T is not None:
                ids_TK = ids_TK.where(valid_T.unsqueeze(1), self.config.num_experts)
                weights_TK = weights_TK.where(valid_T.unsqueeze(1), 0.0)
            routing = Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T)
            return self._drop(routing) if self.config.capacity_factor > 0 else routing

    def _logits(self, x_TD: Tensor) -> Tensor:
        double = x_TD.dtype == torch.float64 or self.config.router_dtype == "fp64"
        wide = torch.float64 if double else torch.float32
        x_TD = x_TD.to(wide)
        if self.training and self.config.jitter_eps > 0:
            eps = self.config.jitter_eps
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - eps, 1 + eps)
        bias = None if self.bias is None else replicated(self.bias).to(wide)
        return F.linear(x_TD, replicated(self.weight).to(wide), bias)

    def _choose(
        self,
        logits_TE: Tensor,
        token_ids_T: Tensor | None,
        valid_T: Tensor | None,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """scores_TE, topk_ids_TK, topk_weights_TK."""
        config = self.config
        if config.routing == "topk" or (config.routing == "sinkhorn" and not self.training):
            return route(
                logits_TE, config.top_k, score_function=config.score_function, normalize=config.norm_topk_prob,
                scaling_factor=config.routed_scaling_factor, softmax_after_topk=config.softmax_after_topk,
                bias_E=self.e_score_correction_bias, n_group=config.n_group, topk_group=config.topk_group,
                group_score_top=config.group_score_top,
            )  # fmt: skip
        scores_TE = router_scores(logits_TE, config.score_function)
        if config.routing == "sparsemixer":
            return scores_TE, *self._sparsemixer(logits_TE)
        num_tokens, num_experts, top_k, device = *logits_TE.shape, config.top_k, logits_TE.device
        if config.routing == "sinkhorn":
            ids_TK = sinkhorn(logits_TE, valid_T=valid_T, group=group).topk(top_k, dim=-1).indices
        elif config.routing == "hash":
            if token_ids_T is None:
                raise ConfigError('MoE token_ids is None: must be the ids of the tokens with moe.routing "hash"')
            ids_TK = hash_assignment(token_ids_T, num_experts, top_k, self.hash_seed)
        elif config.routing == "random":
            ids_TK = random_assignment(num_tokens, num_experts, top_k, device)
        else:
            ids_TK = uniform_assignment(num_tokens, num_experts, top_k, device)
        return scores_TE, ids_TK, self._weights(logits_TE, scores_TE, ids_TK)

    def _weights(self, logits_TE: Tensor, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """Weights of experts that were not chosen by score."""
        config = self.config
        if config.routing == "sparsemixer":
            return self._sparsemixer(logits_TE, ids_TK)[1]
        if config.softmax_after_topk:
            weights_TK = logits_TE.gather(1, ids_TK).softmax(dim=-1)
        else:
            weights_TK = scores_TE.gather(1, ids_TK)
            if config.norm_topk_prob:
                weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(MIN_SUM)
        return weights_TK * config.routed_scaling_factor

    def _sparsemixer(self, logits_TE: Tensor, ids_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        eps, factor = self.config.sparsemixer_eps, self.config.routed_scaling_factor
        ids_TK, weights_TK = sparsemixer(logits_TE, eps, training=self.training, ids_T2=ids_TK)
        return ids_TK, weights_TK * factor

    def _drop(self, routing: Routing) -> Routing:
        config, undropped_TK = self.config, routing.topk_ids_TK
        room = capacity(undropped_TK.shape[0], config.num_experts, config.top_k, config.capacity_factor)
        ids_TK, weights_TK, dropped = keep_within_capacity(
            undropped_TK, routing.topk_weights_TK, config.num_experts, room, config.drop_policy
        )
        slots = slots_of_picks(ids_TK, weights_TK, config.num_experts, room) if config.pad_to_capacity else None
        return routing._replace(
            topk_ids_TK=ids_TK, topk_weights_TK=weights_TK, undropped_ids_TK=undropped_TK, dropped=dropped, slots=slots
        )

    def _expert_choice(self, logits_TE: Tensor, valid_T: Tensor | None) -> Routing:
        config = self.config
        scores_TE = router_scores(logits_TE, config.score_function)
        room = capacity(logits_TE.shape[0], config.num_experts, config.top_k, config.capacity_factor or 1.0)
        tokens_EC, weights_EC = expert_choice(scores_TE, room, valid_T)
        none_T0 = tokens_EC.new_empty(logits_TE.shape[0], 0)
        return Routing(
            none_T0, scores_TE[:, :0], logits_TE, scores_TE, valid_T,
            slots=Slots(tokens_EC, weights_EC * config.routed_scaling_factor),
        )  # fmt: skip

    def extra_repr(self) -> str:
        c = self.config
        return f"{c.hidden_size} -> {c.num_experts}, top_k={c.top_k}, {c.routing} by {c.score_function}"
