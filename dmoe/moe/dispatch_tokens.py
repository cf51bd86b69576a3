"""Expert parallelism in which a token travels once to each rank that has experts of it, and one sum comes back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.moe.dispatch import AllToAllDispatcher, ExpertFunction, SharedFunction, cast_early
from dmoe.moe.router import Routing
from dmoe.ops.all_to_all import exchange_counts
from dmoe.ops.messages import Splits
from dmoe.ops.precision import autocast_dtype
from dmoe.ops.regions import region
from dmoe.ops.token_exchange import return_sums, send_tokens
from dmoe.ops.token_rows import token_rows


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
        if routing.topk_ids_TK.shape[1] == 1:  # a pick is a token
            return super().__call__(x_TD, routing, experts, shared)
        x_TD = x_TD.to(autocast_dtype(x_TD))  # to travel as what the experts compute with
        num_local = self.num_experts // self.group.size()
        ids_TK, weights_TK = routing.topk_ids_TK, routing.topk_weights_TK
        weights_TK = weights_TK if weights_TK.dtype == torch.float64 else weights_TK.float()
        with region("exchange"):
            rows = token_rows(x_TD, ids_TK, weights_TK, self.group.size(), num_local)
            received_W2 = exchange_counts(rows.counts_W2, self.group)
            experts = cast_early(experts)
            (send, _), (receive, picks) = torch.stack([rows.counts_W2, received_W2]).mT.tolist()
        splits = Splits(send, receive)
        sent = send_tokens(x_TD, ids_TK, weights_TK, rows, splits, self.group, num_local, payload=self.payload)
        rows = rows._replace(early=None)  # what was sent
        shared_TD = None if shared is None else shared(x_TD)
        x_SD, weights_SK, ids_SK = sent.wait()
        with sent.inputs_first():
            y_SD = experts(x_SD, ids_SK, weights_SK, sum(picks))
        payload = "same" if self.payload == "same" else "bf16"
        y_TD = return_sums(y_SD, rows, splits, self.group, payload=payload)
        return y_TD if shared_TD is None else y_TD + shared_TD
