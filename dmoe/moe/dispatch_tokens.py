"""Expert parallelism in which a token travels once to each rank that has experts of it, and one sum comes back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.moe.dispatch import AllToAllDispatcher, ExpertFunction, SharedFunction
from dmoe.moe.router import Routing
from dmoe.ops.all_to_all import exchange_counts
from dmoe.ops.exchange import Splits, start_exchange
from dmoe.ops.permute import first_rows, gather_early, gather_rows, sort_early, sum_rows
from dmoe.ops.precision import autocast_dtype
from dmoe.ops.regions import region


class TokenDispatcher(AllToAllDispatcher):
    """As its base, but a row is a token on its way to a rank, however many of its picks are there.

    With K picks over W ranks a token goes to W (1 - (1 - 1/W)^K) of them on average, not K: of 8 picks to 2.0, 3.6 and
    5.3 ranks of 2, 4 and 8. Its picks' ids and weights travel beside it in a small message. The experts of a rank see
    tokens and picks as in one process, those of other ranks being picks of no expert, and the sum over its picks there
    comes back. Those sums are added in the order of the ranks, so a result differs in its rounding from that of one
    rank (in bf16, by the rounding of W partial sums); the same layout gives the same bits.

    Args:
        num_experts: E, of the whole layer.
        payload: what is sent; see `dmoe.ops.exchange.start_exchange`.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, *, payload: str = "same") -> None:
        super().__init__(group, num_experts, payload=payload)

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertFunction, shared: SharedFunction | None
    ) -> Tensor:
        top_k = routing.topk_ids_TK.shape[1]
        if top_k == 1:  # a pick is a token
            return super().__call__(x_TD, routing, experts, shared)
        x_TD = x_TD.to(autocast_dtype(x_TD))  # to travel as what the experts compute with
        size, rank = self.group.size(), self.group.rank()
        num_local = self.num_experts // size
        ids_TK = routing.topk_ids_TK.long()
        ranks_W = torch.arange(size, device=x_TD.device)
        picks_TKW = (ids_TK // num_local).unsqueeze(2) == ranks_W  # the id of no expert is on no rank
        # [T, W]: w where the token goes to rank w, else "no rank"; so rows are sorted by rank as picks are by expert.
        permutation = sort_early(torch.where(picks_TKW.any(1), ranks_W, size), size)
        tokens_W = torch.diff(permutation.offsets_E.long(), prepend=ids_TK.new_zeros(1))
        weights_TK = routing.topk_weights_TK
        weights_TK = weights_TK if weights_TK.dtype == torch.float64 else weights_TK.float()
        picks_TC = torch.cat([weights_TK, ids_TK.to(weights_TK.dtype)], dim=1)  # ids are exact in fp32
        with region("exchange"):
            counts_W2 = torch.stack([tokens_W, picks_TKW.sum((0, 1))], dim=1)
            received_W2 = exchange_counts(counts_W2, self.group)
            counts_3W = torch.stack([tokens_W, *received_W2.t()])
            max_rows = ids_TK.shape[0] * min(size, top_k)
            early_x, early_picks = (gather_early(t, permutation, max_rows) for t in (x_TD, picks_TC))
            send, receive, picks = counts_3W.tolist()
        splits, num_rows = Splits(send, receive), sum(picks)
        permutation = first_rows(permutation, sum(send))
        rows_RD, picks_RC = gather_rows(x_TD, permutation, early_x), gather_rows(picks_TC, permutation, early_picks)
        tokens = start_exchange(rows_RD, None, splits, self.group, payload=self.payload)
        of_picks = start_exchange(picks_RC, None, splits, self.group)
        shared_TD = None if shared is None else shared(x_TD)
        x_SD, picks_SC = tokens.wait()[0], of_picks.wait()[0]

        ids_SK = picks_SC.detach()[:, top_k:].long() - rank * num_local
        ids_SK = torch.where((ids_SK >= 0) & (ids_SK < num_local), ids_SK, num_local)
        y_SD = experts(x_SD, ids_SK, picks_SC[:, :top_k], num_rows)
        payload = "same" if self.payload == "same" else "bf16"
        y_RD = start_exchange(y_SD, None, splits.reversed(), self.group, payload=payload).wait()[0]
        y_TD = sum_rows(y_RD, permutation)
        return y_TD if shared_TD is None else y_TD + shared_TD
