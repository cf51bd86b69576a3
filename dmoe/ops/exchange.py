"""Rows and their routing weights to other ranks, in one message a direction, while the caller computes something else.

`start_exchange` sends, `Exchange.wait` receives. Between them the forward pass is free, and so is the backward pass:
there `wait` sends the gradients and `start_exchange` receives them.

Legend: R rows here, S rows after the exchange, C row width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.config import require
from dmoe.ops.early import EarlyGradients, inputs_first
from dmoe.ops.messages import PAYLOADS, Format, Splits, receive, receive_back, send, send_back, ticket_for
from dmoe.ops.regions import region


class Exchange:
    """Rows under way. `wait()` once, on every rank."""

    def __init__(self, ticket: Tensor, buffer: Tensor, format: Format) -> None:
        self._ticket: Tensor | None = ticket
        self._buffer: Tensor | None = buffer
        self._format = format
        self._early: EarlyGradients | None = None
        # Not inside the compiler, which knows nothing of objects that a backward changes.
        if format.weight_dtype is not None and not torch.compiler.is_compiling():
            self._early = EarlyGradients(partial(_send_back, format), format.width, format.weight_dtype)

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """(rows [S, C], weights [S] or None), in the dtypes that were sent, blocks in the order of the senders."""
        # A second message of gradients would be added to the first one's bits.
        assert self._ticket is not None, "an Exchange is waited for once"
        ticket, self._ticket = self._ticket, None
        buffer, self._buffer = self._buffer, None
        rows, weights = _Finish.apply(ticket, buffer, self._format, self._early)
        return rows, weights if self._format.weight_dtype is not None else None

    def inputs_first(self) -> AbstractContextManager[object]:
        """Experts called in here with what `wait` returned let gradients go back before those of their weights."""
        return nullcontext() if self._early is None else inputs_first(self._early.computed)


def start_exchange(
    rows_RC: Tensor, weights_R: Tensor | None, splits: Splits, group: dist.ProcessGroup, *, payload: str = "same"
) -> Exchange:
    """Send each rank of `group` its block of rows, with a weight for each row that is never rounded.

    Collective, forward and backward: all ranks call it and wait in the same order, ranks without rows too. It is not
    differentiable twice.

    Args:
        rows_RC: [sum(splits.send), C] fp64, fp32, bf16 or fp16, in the order of the receivers.
        weights_R: [R] of any floating dtype; None sends none.
        payload: "same" sends rows as they are; "bf16" rounds them to bf16; "fp8" to e4m3 with an fp32 scale for each
            row (amax / 448), straight through in the backward. Gradients of the last two travel in bf16.

    Returns:
        the exchange, whose `wait()` gives the rows in their own dtype. Differentiable in rows and weights.

    Raises:
        ConfigError: an unknown payload.
    """
    require(payload in PAYLOADS, "payload", payload, f"one of {', '.join(PAYLOADS)}")
    dtype = None if weights_R is None else weights_R.dtype
    format = Format(splits, group.group_name, payload, rows_RC.shape[1], rows_RC.dtype, dtype)
    ticket, buffer = _Start.apply(rows_RC, weights_R, format)
    return Exchange(ticket, buffer, format)


class _Start(torch.autograd.Function):
    """Returns a ticket and the message under way."""

    @staticmethod
    def forward(ctx: Any, rows_RC: Tensor, weights_R: Tensor | None, format: Format) -> tuple[Tensor, Tensor]:
        ctx.format = format
        with region("exchange"):
            message = send(rows_RC, weights_R, format)
        ctx.mark_non_differentiable(message)
        return ticket_for(rows_RC, format), message

    @staticmethod
    def backward(ctx: Any, message: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        with region("exchange"):
            return *receive_back(message, ctx.format), None


class _Finish(torch.autograd.Function):
    """The rows of a message that has arrived."""

    @staticmethod
    def forward(
        ctx: Any, ticket: Tensor, buffer: Tensor, format: Format, early: EarlyGradients | None
    ) -> tuple[Tensor, Tensor | None]:
        ctx.format, ctx.early = format, early
        with region("exchange"):
            return receive(buffer, format)

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor, grad_S: Tensor | None) -> tuple[Tensor, None, None, None]:
        if ctx.early is None or grad_S is None:
            return *_send_back(ctx.format, grad_SC, grad_S), None, None, None
        return *ctx.early.messages(grad_SC, grad_S), None, None, None


def _send_back(format: Format, grad_SC: Tensor, grad_S: Tensor | None) -> tuple[Tensor]:
    with region("exchange"):
        return (send_back(grad_SC, None if grad_S is None else grad_S.flatten(), format),)
