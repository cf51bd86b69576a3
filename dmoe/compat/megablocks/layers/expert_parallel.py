"""Tokens to the ranks that hold their experts, and back.

Legend: T tokens here, D width, K picks, E experts of the layer, R = T*K rows here, W ranks of the group, e experts and
S rows of one rank, hsd ranks that hold parts of the features of the same experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.compat.megablocks.layers import mpu
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.ops import sort_by_expert
from dmoe.ops.all_to_all import exchange_counts
from dmoe.ops.exchange import start_exchange
from dmoe.ops.messages import Splits
from dmoe.ops.permute import gather_rows, sum_rows

LocalExperts = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(x_SD, local ids_S1, weights_S1, tokens of all ranks) -> y_SD."""


def exchange_and_compute(
    x_TD: Tensor, top_experts_TK: Tensor, weights_TK: Tensor, args: Arguments, experts: LocalExperts
) -> Tensor:
    """[T, D]: the weighted sums over each token's picks, computed where the experts are. Collective.

    An expert gets the rows of all ranks in the order in which one process would have them. Ranks may have different
    numbers of tokens, none included. The one host synchronisation reads how many rows go and come.
    """
    group = dist.group.WORLD if args.expert_parallel_group is None else args.expert_parallel_group
    assert group is not None  # else the layer could not have been made
    hsd, e = mpu.hidden_sharding_degree(args), mpu.experts_per_rank(args)
    permutation = sort_by_expert(top_experts_TK, args.moe_num_experts)
    rows_RD = gather_rows(x_TD, permutation)
    weights_R = weights_TK.flatten().index_select(0, permutation.order_R)

    offsets_E = permutation.offsets_E.long()
    counts_E = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1))
    counts_We = counts_E.view(-1, e).repeat(hsd, 1)
    num_tokens_W1 = counts_We.new_full((counts_We.shape[0], 1), x_TD.shape[0])
    received = exchange_counts(torch.cat([counts_We, num_tokens_W1], dim=1), group)
    received_We, num_tokens = received[:, :e], received[:, e]
    sent, came, tokens = torch.stack([counts_We.sum(1), received_We.sum(1), num_tokens]).tolist()
    splits = Splits(sent, came)

    exchange = start_exchange(rows_RD.repeat(hsd, 1), weights_R.repeat(hsd), splits, group)
    ids_We = torch.arange(e, device=x_TD.device).expand(received_We.shape)
    ids_S = ids_We.flatten().repeat_interleave(received_We.flatten(), output_size=sum(came))
    x_SD, weights_S = exchange.wait()
    assert weights_S is not None
    y_SD = experts(x_SD, ids_S.unsqueeze(1), weights_S.unsqueeze(1), sum(tokens))
    y_RD = start_exchange(y_SD, None, splits.reversed(), group).wait()[0]
    if hsd > 1:
        y_RD = y_RD.view(hsd, -1, y_RD.shape[1]).sum(0)
    return sum_rows(y_RD, permutation)
