"""Tokens and their picks to the ranks of their experts, and the sums of those experts' results back.

`send_tokens` sends, `SentTokens.wait` receives, `return_sums` sends back and adds up. Between the first two the forward
pass is free, and so is the backward pass: there `wait` sends the gradients and `send_tokens` receives them. Tokens and
picks are a message each: the picks are never rounded, and few.

Legend: T tokens, K picks a token, W ranks, R rows here, S rows after the exchange, D width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.ops.early import EarlyGradients, inputs_first
from dmoe.ops.messages import Format, Splits, receive, receive_back, send, send_back, ticket_for
from dmoe.ops.regions import region
from dmoe.ops.token_rows import TokenRows, rows_to_send, spread_token_rows, sum_token_rows


class SentTokens:
    """Tokens and picks under way. `wait()` once, on every rank."""

    def __init__(self, tickets: tuple[Tensor, Tensor], buffers: tuple[Tensor, Tensor], formats: _Formats) -> None:
        self._under_way: tuple[Tensor, ...] | None = (*tickets, *buffers)
        self._formats = formats
        self._early: EarlyGradients | None = None
        # Not inside the compiler, which knows nothing of objects that a backward changes.
        if not torch.compiler.is_compiling():
            of_tokens, of_picks = formats
            self._early = EarlyGradients(partial(_send_back, formats), of_tokens.width, of_picks.dtype)

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """x_SD, weights_SK, and ids_SK int32: the number of a pick's expert on this rank, or that of its experts if it
        is not of them. Blocks in the order of the senders."""
        # A second message of gradients would be added to the first one's bits.
        assert self._under_way is not None, "tokens are waited for once"
        under_way, self._under_way = self._under_way, None
        return _Receive.apply(*under_way, self._formats, self._early)

    def inputs_first(self) -> AbstractContextManager[object]:
        """Experts called in here with what `wait` returned let gradients go back before those of their weights."""
        return nullcontext() if self._early is None else inputs_first(self._early.computed)


_Formats = tuple[Format, Format]
"""Of the tokens, and of the picks: as wide as the gradients of their weights, which come back."""


def send_tokens(
    x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, rows: TokenRows, splits: Splits,
    group: dist.ProcessGroup, num_local: int, *, payload: str = "same",
) -> SentTokens:  # fmt: skip
    """Start to send tokens and picks. Collective, forward and backward; differentiable in tokens and weights, once.

    Args:
        topk_weights_TK: fp32 or fp64.
        rows: of these tokens; see `dmoe.ops.token_rows`.
        splits: the rows for each rank and from each.
        num_local: experts of a rank.
        payload: of the tokens; see `dmoe.ops.exchange.start_exchange`.
    """
    name, weight_dtype = group.group_name, topk_weights_TK.dtype
    formats = (
        Format(splits, name, payload, x_TD.shape[1], x_TD.dtype),
        Format(splits, name, "same", topk_ids_TK.shape[1], weight_dtype),
    )
    *tickets, of_tokens, of_picks = _Send.apply(x_TD, topk_weights_TK, topk_ids_TK, rows, num_local, formats)
    return SentTokens((tickets[0], tickets[1]), (of_tokens, of_picks), formats)


def return_sums(
    y_SD: Tensor, rows: TokenRows, splits: Splits, group: dist.ProcessGroup, *, payload: str = "same"
) -> Tensor:
    """y_TD: the rows that this rank computed go back, and those of a token are added up. Collective, forward and
    backward; differentiable once.

    Args:
        y_SD: in the order of `SentTokens.wait`.
        splits: of the way out.
    """
    format = Format(splits.reversed(), group.group_name, payload, y_SD.shape[1], y_SD.dtype)
    return _ReturnSums.apply(y_SD, rows.inverse_TW, rows.order_R, format)


class _Send(torch.autograd.Function):
    """Returns a ticket for each message, and the messages under way."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor, rows: TokenRows, num_local: int, formats: _Formats
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows.inverse_TW)
        ctx.formats = formats
        of_tokens, of_picks = formats
        with region("exchange"):
            x_RD, picks_RC = rows_to_send(rows, sum(of_tokens.splits.send), x_TD, ids_TK, weights_TK, num_local)
            messages = send(x_RD, None, of_tokens), send(picks_RC, None, of_picks)
        ctx.mark_non_differentiable(*messages)
        return ticket_for(x_RD, of_tokens), ticket_for(picks_RC, of_picks), *messages

    @staticmethod
    def backward(ctx: Any, tokens: Tensor, weights: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_TW,) = ctx.saved_tensors
        with region("exchange"):
            grads = [receive_back(message, f)[0] for message, f in zip((tokens, weights), ctx.formats)]
            return *(sum_token_rows(grad, inverse_TW) for grad in grads), None, None, None, None


class _Receive(torch.autograd.Function):
    """Tokens, weights and ids that have arrived."""

    @staticmethod
    def forward(
        ctx: Any, _x: Tensor, _w: Tensor, of_tokens: Tensor, of_picks: Tensor, formats: _Formats,
        early: EarlyGradients | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        ctx.formats, ctx.early = formats, early
        top_k = formats[1].width
        with region("exchange"):
            x_SD, picks_SC = (receive(m, f)[0] for m, f in zip((of_tokens, of_picks), formats))
            ids_SK = picks_SC[:, top_k:].to(torch.int32)
            ctx.mark_non_differentiable(ids_SK)
            return x_SD, picks_SC[:, :top_k].contiguous(), ids_SK

    @staticmethod
    def backward(ctx: Any, grad_SD: Tensor, grad_SK: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = grad_SD, grad_SK
        messages = _send_back(ctx.formats, *grads) if ctx.early is None else ctx.early.messages(*grads)
        return *messages, None, None, None, None


def _send_back(formats: _Formats, grad_SD: Tensor, grad_SK: Tensor) -> tuple[Tensor, ...]:
    with region("exchange"):
        return tuple(send_back(grad, None, f) for grad, f in zip((grad_SD, grad_SK), formats))


class _ReturnSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, inverse_TW: Tensor, order_R: Tensor | None, format: Format) -> Tensor:
        ctx.save_for_backward(inverse_TW, order_R)
        ctx.format = format
        with region("exchange"):
            y_RD = receive(send(y_SD, None, format), format)[0]
            return sum_token_rows(y_RD, inverse_TW)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        inverse_TW, order_R = ctx.saved_tensors
        format: Format = ctx.format
        with region("exchange"):
            grad_RD = spread_token_rows(grad_TD, inverse_TW, order_R, sum(format.splits.receive))
            grad_SD, _ = receive_back(send_back(grad_RD, None, format), format)
            return grad_SD, None, None, None
