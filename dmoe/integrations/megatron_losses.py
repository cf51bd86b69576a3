"""Megatron-core's auxiliary losses of a router, attached and logged by its rules.

Megatron scales them at the backward by a number that its schedule sets after the forward, and averages the gradients
of its data-parallel ranks, so that the losses that `MoE` attaches by itself would have another size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.moe import Routing
from dmoe.ops.balancing import normalized_scores, router_z_loss
from dmoe.ops.collectives import finish_all_reduce, start_all_reduce


class Tokens(NamedTuple):
    """What the losses see of a forward: T = S * B tokens, token s * B + b being position s of sequence b."""

    num_sequences: int
    """B."""
    valid_T: Tensor | None = None
    """bool, False for padding. None: no padding."""


class RouterLosses(nn.Module):
    """The balancing losses and the z-loss of one layer, coefficients those of `config`.

    A balancing loss is, over E experts and N tokens, E / (K * N^2) * sum_e n_e * P_e: n_e the picks of expert e in the
    batch, and P_e the sum of its scores, normalised for each token, over the tokens of this rank; the loss of the
    batch is the sum over ranks (Fedus et al., arXiv:2101.03961, eq. 4-6). The picks are the K highest scores, without
    the bias and the groups of the choice and before any is dropped. The batch is the micro-batch on the ranks of
    tensor and context parallelism ("aux_loss"), each of its sequences ("seq_aux_loss"), or the mean over the
    micro-batches of a step so far on all data-parallel ranks ("global_aux_loss").

    Args:
        megatron: the `TransformerConfig`.
        groups: its process groups; `tp_cp` and `tp_dp_cp` are read.
    """

    global_tokens_per_expert: Tensor
    ga_steps: Tensor

    def __init__(self, config: MoEConfig, megatron: Any, groups: Any, device: Any) -> None:
        super().__init__()
        self.config, self.megatron, self.groups = config, megatron, groups
        if config.global_aux_loss_coef:
            # int64, so that a model cast to bf16 still counts.
            counts_E = torch.zeros(config.num_experts, dtype=torch.int64, device=device)
            self.register_buffer("global_tokens_per_expert", counts_E, persistent=False)
            self.register_buffer("ga_steps", torch.zeros((), dtype=torch.int64, device=device), persistent=False)

    def reset_global_aux_loss_tracker(self) -> None:
        """Megatron calls it after each step."""
        if self.config.global_aux_loss_coef:
            self.global_tokens_per_expert.zero_()
            self.ga_steps.zero_()

    def start(self, routing: Routing, tokens: Tokens) -> list[tuple[str, Tensor]]:
        """Counts of picks by name of the loss, [E], or [B, E] by sequence; their sums over ranks are under way."""
        config = self.config
        counts_BE = self._counts(routing, tokens)
        counts = [
            ("aux_loss", config.aux_loss_coef, counts_BE.sum(0), self.groups.tp_cp),
            ("seq_aux_loss", config.seq_aux_loss_coef, counts_BE, self.groups.tp_cp),
            ("global_aux_loss", config.global_aux_loss_coef, counts_BE.sum(0), self.groups.tp_dp_cp),
        ]
        return [(name, start_all_reduce(n, group)) for name, coef, n, group in counts if coef]

    def attach(
        self, y_TD: Tensor, routing: Routing, tokens: Tokens, counts: list[tuple[str, Tensor]], layer_number: int | None
    ) -> Tensor:
        """`y_TD`, whose backward also gives the losses their gradient; their values go to Megatron's tracker."""
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        losses = [self._balancing(name, finish_all_reduce(n), routing, tokens, layer_number) for name, n in counts]
        if self.config.z_loss_coef:
            losses.append(self._z_loss(routing, tokens, layer_number))
        if not losses:
            return y_TD
        loss = torch.stack(losses).sum()
        if self.megatron.calculate_per_token_loss:  # Megatron then divides gradients by the tokens of all ranks
            num_tokens = routing.scores_TE.shape[0] if tokens.valid_T is None else tokens.valid_T.sum()
            loss = loss * num_tokens * self.groups.tp_cp.size()
        return MoEAuxLossAutoScaler.apply(y_TD, loss)

    def _counts(self, routing: Routing, tokens: Tokens) -> Tensor:
        ids_TK = routing.scores_TE.topk(self.config.top_k, dim=-1).indices
        chosen_TE = torch.zeros_like(routing.scores_TE, dtype=torch.int64).scatter_(1, ids_TK, 1)
        if tokens.valid_T is not None:
            chosen_TE = chosen_TE * tokens.valid_T.unsqueeze(1)
        return self._by_sequence(chosen_TE, tokens)

    def _by_sequence(self, values_TE: Tensor, tokens: Tokens) -> Tensor:
        """[B, E]: sums over the positions of each sequence."""
        return values_TE.unflatten(0, (-1, tokens.num_sequences)).sum(0)

    def _balancing(self, name: str, counts: Tensor, routing: Routing, tokens: Tokens, layer: int | None) -> Tensor:
        config = self.config
        scores_TE = normalized_scores(routing.scores_TE)
        if tokens.valid_T is not None:
            scores_TE = scores_TE * tokens.valid_T.unsqueeze(1)
        scores_BE = self._by_sequence(scores_TE, tokens)
        num_tokens = counts.sum() / config.top_k  # all picks: no expert has gone without its own
        if name == "seq_aux_loss":
            num_tokens = num_tokens / tokens.num_sequences
        else:
            scores_BE = scores_BE.sum(0)
        if name == "global_aux_loss":
            self.global_tokens_per_expert += counts
            self.ga_steps += 1
            counts = self.global_tokens_per_expert / self.ga_steps
        loss = (scores_BE * counts).sum() * config.num_experts / (config.top_k * num_tokens.clamp_min(1).square())
        if name == "seq_aux_loss":
            loss = loss / tokens.num_sequences
        is_global = name == "global_aux_loss"
        group = self.groups.tp_dp_cp if is_global else self.groups.tp_cp
        self._track(_TRACKED[name], loss, layer, reduce_group=group, reduce_group_has_dp=is_global)
        return loss * getattr(config, f"{name}_coef")

    def _z_loss(self, routing: Routing, tokens: Tokens, layer: int | None) -> Tensor:
        logits_TE = routing.logits_TE
        if tokens.valid_T is None:
            loss = router_z_loss(logits_TE)
        else:
            squares_T = logits_TE.logsumexp(dim=-1).square() * tokens.valid_T
            loss = squares_T.sum() / tokens.valid_T.sum().clamp_min(1)
        self._track("z_loss", loss, layer)
        return loss * (self.config.z_loss_coef / self.groups.tp_cp.size())

    def _track(self, name: str, loss: Tensor, layer: int | None, **reduction: Any) -> None:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        num_layers = self.megatron.num_layers + (self.megatron.mtp_num_layers or 0)
        save_to_aux_losses_tracker(name, loss.float(), layer, num_layers, **reduction)


_TRACKED = {
    # the names under which Megatron logs them
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
