"""Sums over all tokens of a batch that is spread over ranks, for losses and statistics that need the whole of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.moe.router import Routing
from dmoe.ops.collectives import finish_all_reduce, start_all_reduce
from dmoe.ops.routing import (
    balancing_loss_from_sums,
    count_tokens_per_expert,
    normalized_scores,
    router_z_loss,
)


def start_batch_sums(routing: Routing, group: dist.ProcessGroup | None) -> BatchSums:
    """Sum over the tokens of every rank of `group` (None: of this one alone); the reduction is under way."""
    num_tokens, num_experts = routing.scores_TE.shape
    with torch.no_grad():
        probs_TE = normalized_scores(routing.scores_TE)
        z_sum, entropy_sum = router_z_loss(routing.logits_TE, 1), torch.special.entr(probs_TE).sum()
        counts_E = count_tokens_per_expert(routing.topk_ids_TK, num_experts)
        # One message, in fp64 so that counts stay exact.
        scalars = torch.stack([z_sum, entropy_sum, torch.full_like(z_sum, num_tokens)])
        sums = torch.cat([counts_E.double(), probs_TE.sum(dim=0).double(), scalars.double()])
        if group is not None:
            sums = start_all_reduce(sums, group)
    return BatchSums(sums, num_experts, routing.topk_ids_TK.shape[1], under_way=group is not None)


class BatchSums:
    """Counts and sums of one forward of one layer; its properties wait for the reduction."""

    def __init__(self, sums: Tensor, num_experts: int, top_k: int, *, under_way: bool) -> None:
        self._sums, self.num_experts, self.top_k, self._under_way = sums, num_experts, top_k, under_way

    def wait(self) -> None:
        """Finish the reduction; does nothing the second time."""
        if self._under_way:
            self._sums, self._under_way = finish_all_reduce(self._sums), False

    @property
    def num_tokens(self) -> Tensor:
        """Tokens of the batch, at least 1."""
        self.wait()
        return self._sums[-1].clamp_min(1)

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """Picks of each expert, fp64."""
        self.wait()
        return self._sums[: self.num_experts]

    @property
    def scalars(self) -> Tensor:
        """fp64 [3]: load-balancing loss, z-loss (without coefficients) and router entropy of the batch."""
        num_tokens = self.num_tokens
        prob_sums_E = self._sums[self.num_experts : 2 * self.num_experts]
        aux_loss = balancing_loss_from_sums(prob_sums_E, self.tokens_per_expert_E, self.top_k, num_tokens)
        return torch.cat([aux_loss.unsqueeze(0), self._sums[-3:-1] / num_tokens])
