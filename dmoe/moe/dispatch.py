"""Where the experts are, and how tokens get there and back.

A dispatcher is called with the tokens, their routing, the experts of this rank and the shared expert, and returns the
layer's output. `dmoe.parallel` puts another one into a layer; the layer itself does not change.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmoe.config import require
from dmoe.moe.experts import Experts
from dmoe.moe.router import Routing
from dmoe.ops.all_to_all import exchange_counts
from dmoe.ops.collectives import all_gather_rows, reduce_scatter_rows
from dmoe.ops.exchange import Exchange, start_exchange
from dmoe.ops.messages import PAYLOADS, Splits
from dmoe.ops.permute import Permutation, first_rows, gather_early, gather_rows, sort_early, sum_rows
from dmoe.ops.precision import autocast_dtype
from dmoe.ops.regions import region

ExpertFunction = Callable[..., Tensor]
"""(x_TD, topk_ids_TK, topk_weights_TK) -> y_TD; `Experts` is one. Dispatchers that know how many of the picks are of
its experts may say so in a fourth argument."""
SharedFunction = Callable[[Tensor], Tensor]
Dispatcher = Callable[[Tensor, Routing, ExpertFunction, "SharedFunction | None"], Tensor]


def dispatch_local(x_TD: Tensor, routing: Routing, experts: ExpertFunction, shared: SharedFunction | None) -> Tensor:
    """Every expert is on this rank."""
    y_TD = experts(x_TD, routing.topk_ids_TK, routing.topk_weights_TK)
    return y_TD if shared is None else y_TD + shared(x_TD)


class TensorParallelDispatcher:
    """Every rank of `group` holds a part of each expert's width and has tokens of its own, equally many.

    Tokens are gathered, each rank computes its part of every expert, and the parts are added where tokens came from.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertFunction, shared: SharedFunction | None
    ) -> Tensor:
        x_TD = x_TD.to(autocast_dtype(x_TD))  # to travel as what the experts compute with
        x, ids, weights = (all_gather_rows(t, self.group) for t in (x_TD, *routing[:2]))
        y_TD = reduce_scatter_rows(experts(x, ids, weights), self.group)
        return y_TD if shared is None else y_TD + shared(x_TD)


class AllToAllDispatcher:
    """Expert parallelism: rank r of `group` holds experts r * e to (r + 1) * e - 1, e = E / ranks.

    A row travels for each pick of an expert, with its weight and nothing else; a pick of no expert (id E) stays here.
    Rows are sorted by expert, so the counts, exchanged before, tell the receiver whose they are. Reading those counts
    is the one synchronisation with the device. The shared expert is computed while the rows travel. An expert gets the
    rows of all ranks in the order in which one process would have them, and picks are added in the same order, so that
    the numbers are those of one rank.

    Args:
        num_experts: E, of the whole layer.
        payload: what is sent; see `dmoe.ops.exchange.start_exchange`.
        max_rows: 0, or the most rows that a rank takes in at once. When any rank would get more, all work in equally
            many chunks, each sent again and recomputed in the backward, so that a skewed batch takes longer and no more
            memory. A matrix product may round a row otherwise in a chunk; nothing else does. Not inside the compiler.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int, *, payload: str = "same", max_rows: int = 0) -> None:
        size = group.size()
        require(num_experts % size == 0, "moe.num_experts", num_experts, f"divisible by the {size} ranks of the group")
        require(payload in PAYLOADS, "exchange", payload, f"one of {', '.join(PAYLOADS)}")
        require(
            max_rows == 0 or max_rows >= size, "max_rows", max_rows, f"0, or at least the {size} ranks of the group"
        )
        self.group, self.num_experts, self.payload, self.max_rows = group, num_experts, payload, max_rows

    def __call__(
        self, x_TD: Tensor, routing: Routing, experts: ExpertFunction, shared: SharedFunction | None
    ) -> Tensor:
        x_TD = x_TD.to(autocast_dtype(x_TD))  # to travel as what the experts compute with
        if routing.even and not self.max_rows:
            y_TD = self._exchange_evenly(x_TD, routing.topk_weights_TK.flatten(), experts)
            return y_TD if shared is None else y_TD + shared(x_TD)
        permutation = sort_early(routing.topk_ids_TK, self.num_experts)
        offsets_E = permutation.offsets_E.long()
        counts_We = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).view(self.group.size(), -1)
        weights_TK = routing.topk_weights_TK
        if self.max_rows:
            shared_TD = None if shared is None else shared(x_TD)
            counts_WWe = all_gather_rows(counts_We.unsqueeze(0), self.group)  # [senders, receivers, local experts]
            blocks = counts_WWe.sum(2).tolist()
            permutation = first_rows(permutation, sum(blocks[self.group.rank()]))
            rows_RD, weights_R = _rows_to_send(x_TD, weights_TK, permutation)
            y_RD = self._in_chunks(rows_RD, weights_R, counts_WWe, blocks, experts)
        else:
            with region("exchange"):
                received_We = exchange_counts(counts_We, self.group)
                counts_2W = torch.stack([counts_We.sum(1), received_We.sum(1)])
                early = gather_early(x_TD, permutation, weights_TK.numel())
                experts = cast_early(experts)
                splits = Splits(*counts_2W.tolist())
            permutation = first_rows(permutation, sum(splits.send))
            rows_RD, weights_R = _rows_to_send(x_TD, weights_TK, permutation, early)
            exchange = start_exchange(rows_RD, weights_R, splits, self.group, payload=self.payload)
            shared_TD = None if shared is None else shared(x_TD)
            ids_S = _local_ids(received_We, sum(splits.receive))
            y_RD = self._compute_and_return(exchange, ids_S, splits, experts)
        y_TD = sum_rows(y_RD, permutation)
        return y_TD if shared_TD is None else y_TD + shared_TD

    def _exchange_evenly(self, rows_RD: Tensor, weights_R: Tensor, experts: ExpertFunction) -> Tensor:
        """Equally many rows for each expert on every rank, sorted by expert: nothing has to be counted or read."""
        num_rows, size, num_local = rows_RD.shape[0], self.group.size(), self.num_experts // self.group.size()
        splits = Splits([num_rows // size] * size, [num_rows // size] * size)
        exchange = start_exchange(rows_RD, weights_R, splits, self.group, payload=self.payload)
        ids_e = torch.arange(num_local, device=rows_RD.device)
        ids_S = ids_e.repeat_interleave(num_rows // self.num_experts).repeat(size)
        return self._compute_and_return(exchange, ids_S, splits, experts)

    def _compute_and_return(self, exchange: Exchange, ids_S: Tensor, splits: Splits, experts: ExpertFunction) -> Tensor:
        x_SD, weights_S = exchange.wait()
        assert weights_S is not None
        with exchange.inputs_first():
            y_SD = experts(x_SD, ids_S.unsqueeze(1), weights_S.unsqueeze(1))
        payload = "same" if self.payload == "same" else "bf16"
        return start_exchange(y_SD, None, splits.reversed(), self.group, payload=payload).wait()[0]

    def _in_chunks(
        self, rows_RD: Tensor, weights_R: Tensor, counts_WWe: Tensor, blocks: list[list[int]], experts: ExpertFunction
    ) -> Tensor:
        """The exchange in chunks: chunk c of n takes the c-th n-th of the rows that go from one rank to another.

        blocks[s][r] rows go from s to r, counts_WWe[s, r, i] of them to its local expert i.
        """
        size, rank = self.group.size(), self.group.rank()
        num_chunks = _num_chunks(blocks, self.max_rows)
        sent = _pieces(blocks[rank], num_chunks)
        received = _pieces([row[rank] for row in blocks], num_chunks)
        rows, weights = _by_chunk(rows_RD, sent), _by_chunk(weights_R, sent)

        def compute(rows_RD: Tensor, weights_R: Tensor, counts_We: Tensor, chunk: int) -> Tensor:
            splits = Splits([p[chunk] for p in sent], [p[chunk] for p in received])
            exchange = start_exchange(rows_RD, weights_R, splits, self.group, payload=self.payload)
            ids_S = _local_ids(_chunk_counts(counts_We, chunk, num_chunks), sum(splits.receive))
            return self._compute_and_return(exchange, ids_S, splits, experts)

        results = []
        for c in range(num_chunks):
            args = rows[c], weights[c], counts_WWe[:, rank], c
            if num_chunks > 1 and torch.is_grad_enabled():
                results.append(checkpoint(compute, *args, use_reentrant=False))
            else:
                results.append(compute(*args))
        by_block = [y.split([p[c] for p in sent]) for c, y in enumerate(results)]
        return torch.cat([by_block[c][w] for w in range(size) for c in range(num_chunks)])


def cast_early(experts: ExpertFunction) -> ExpertFunction:
    """The experts, with weights cast now: it gives a GPU something to do while the host waits for it."""
    cast = experts.cast_weights() if isinstance(experts, Experts) else None
    return experts if cast is None else partial(experts, cast=cast)


def _rows_to_send(
    x_TD: Tensor, weights_TK: Tensor, permutation: Permutation, early: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The token and the weight of each row."""
    return gather_rows(x_TD, permutation, early), weights_TK.flatten().index_select(0, permutation.order_R)


def _local_ids(counts_We: Tensor, num_rows: int) -> Tensor:
    """[S]: the local expert of each received row; counts_We[w, i] rows come from rank w for local expert i."""
    num_ranks, num_local = counts_We.shape
    ids_We = torch.arange(num_local, device=counts_We.device).repeat(num_ranks)
    return ids_We.repeat_interleave(counts_We.flatten(), output_size=num_rows)


def _num_chunks(blocks: list[list[int]], max_rows: int) -> int:
    """The fewest chunks in which no rank takes in more than `max_rows` at once; blocks[s][r] rows go from s to r.
    In as many chunks as the largest block has rows, a rank takes in at most one row from each."""
    columns = list(zip(*blocks))

    def fits(num_chunks: int) -> bool:
        return max(sum(-(-n // num_chunks) for n in column) for column in columns) <= max_rows

    candidates = range(1, max(1, *map(max, columns)) + 1)
    return candidates[bisect_left(candidates, True, key=fits)]


def _pieces(blocks: list[int], num_chunks: int) -> list[list[int]]:
    """For each block the rows that it has in each chunk."""
    return [[n * (c + 1) // num_chunks - n * c // num_chunks for c in range(num_chunks)] for n in blocks]


def _chunk_counts(counts_We: Tensor, chunk: int, num_chunks: int) -> Tensor:
    """Of counts_We, the rows that are in one chunk: `_pieces` by expert, without reading them."""
    ends_We = counts_We.cumsum(1)
    totals_W1 = ends_We[:, -1:]
    low, high = totals_W1 * chunk // num_chunks, totals_W1 * (chunk + 1) // num_chunks
    return (ends_We.minimum(high) - (ends_We - counts_We).maximum(low)).clamp_min(0)


def _by_chunk(rows: Tensor, pieces: list[list[int]]) -> list[Tensor]:
    """The rows of each chunk, from rows in blocks."""
    parts = rows.split([n for block in pieces for n in block])
    num_chunks = len(pieces[0])
    return [torch.cat(parts[c::num_chunks]) for c in range(num_chunks)]
