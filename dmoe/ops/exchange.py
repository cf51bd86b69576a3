"""Rows and their routing weights to other ranks, in one message a direction, while the caller computes something else.

`start_exchange` sends, `Exchange.wait` receives. Between them the forward pass is free, and so is the backward pass:
there `wait` sends the gradients and `start_exchange` receives them.

Legend: R rows here, S rows after the exchange, C row width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.config import require
from dmoe.ops.regions import region

PAYLOADS = ("same", "bf16", "fp8")
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Splits(NamedTuple):
    """How many rows go to each rank of the group, and how many come from each."""

    send: list[int]
    receive: list[int]

    def reversed(self) -> Splits:
        """The way back."""
        return Splits(self.receive, self.send)


class Exchange:
    """Rows under way. `wait()` once, on every rank."""

    def __init__(self, ticket: Tensor, buffer: Tensor, format: _Format) -> None:
        self._ticket: Tensor | None = ticket
        self._buffer, self._format = buffer, format

    def wait(self) -> tuple[Tensor, Tensor | None]:
        """(rows [S, C], weights [S] or None), in the dtypes that were sent, blocks in the order of the senders."""
        # A second message of gradients would be added to the first one's bits.
        assert self._ticket is not None, "an Exchange is waited for once"
        ticket, self._ticket = self._ticket, None
        rows, weights = _Finish.apply(ticket, self._buffer, self._format)
        return rows, weights if self._format.weight_dtype is not None else None


class _Format(NamedTuple):
    """What a message holds, and to whom it goes."""

    splits: Splits
    group_name: str
    payload: str
    width: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None

    @property
    def grad_dtype(self) -> torch.dtype:
        return self.dtype if self.payload == "same" else torch.bfloat16

    @property
    def weight_width(self) -> int:
        """Columns that a weight takes in a message of `grad_dtype`."""
        if self.weight_dtype is None:
            return 0
        return 1 if self.weight_dtype == self.grad_dtype else self.weight_dtype.itemsize


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
    format = _Format(splits, group.group_name, payload, rows_RC.shape[1], rows_RC.dtype, dtype)
    ticket, buffer = _Start.apply(rows_RC, weights_R, format)
    return Exchange(ticket, buffer, format)


class _Start(torch.autograd.Function):
    """Returns a ticket, which stands for the message in the graph and takes no memory, and the message under way.

    The ticket has the shape and dtype of the gradient message that comes back, as autograd wants; it is not read.
    """

    @staticmethod
    def forward(rows_RC: Tensor, weights_R: Tensor | None, format: _Format) -> tuple[Tensor, Tensor]:
        ticket = rows_RC.new_zeros(1, 1, dtype=format.grad_dtype)
        ticket = ticket.expand(rows_RC.shape[0], format.width + format.weight_width)
        pack = _pack_fp8 if format.payload == "fp8" else _pack
        with region("exchange"):
            return ticket, _send(pack(rows_RC, weights_R, format), format.splits, format.group_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.format = inputs[2]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, message: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None]:
        with region("exchange"):
            return *_unpack(_received(message), ctx.format), None


class _Finish(torch.autograd.Function):
    """The rows of a message that has arrived."""

    @staticmethod
    def forward(ticket: Tensor, buffer: Tensor, format: _Format) -> tuple[Tensor, Tensor | None]:
        unpack = _unpack_fp8 if format.payload == "fp8" else _unpack
        with region("exchange"):
            return unpack(_received(buffer), format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> None:
        ctx.format = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad_SC: Tensor, grad_S: Tensor | None) -> tuple[Tensor, None, None]:
        format: _Format = ctx.format
        with region("exchange"):
            message = _send(_pack(grad_SC, grad_S, format), format.splits.reversed(), format.group_name)
        # Anomaly detection reads what a backward returns. (It cannot be asked for inside the compiler.)
        is_read = not torch.compiler.is_compiling() and torch.is_anomaly_enabled()
        return _received(message) if is_read else message, None, None


def _send(message: Tensor, splits: Splits, group_name: str) -> Tensor:
    """Start the collective; the result may be read after `_received`. An operator that the compiler knows."""
    return torch.ops._c10d_functional.all_to_all_single(message, splits.receive, splits.send, group_name)


def _received(message: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(message)


def _pack(rows_RC: Tensor, weights_R: Tensor | None, format: _Format) -> Tensor:
    """A message of `grad_dtype`: the row, then the weight. Gradients are packed like rows."""
    rows = rows_RC.to(format.grad_dtype)
    if format.weight_dtype is None or weights_R is None:
        return rows.contiguous()
    weights_R1 = weights_R.unsqueeze(1)
    if weights_R1.dtype != rows.dtype:
        # A byte a column, in the low bits: whatever the bytes, the column is a small number and never NaN.
        columns = _as(weights_R1, torch.uint8).to(_INTEGERS[rows.dtype.itemsize])
        weights_R1 = columns.view(rows.dtype)
    return torch.cat([rows, weights_R1], dim=1)


def _unpack(message: Tensor, format: _Format) -> tuple[Tensor, Tensor | None]:
    if format.weight_dtype is None:
        return message.to(format.dtype), None
    rows, weights = message[:, : format.width].to(format.dtype), message[:, format.width :]
    if format.weight_dtype != format.grad_dtype:
        columns = _as(weights, _INTEGERS[format.grad_dtype.itemsize]).to(torch.uint8)
        weights = columns.view(format.weight_dtype)
    return rows.contiguous(), weights.flatten()


def _pack_fp8(rows_RC: Tensor, weights_R: Tensor | None, format: _Format) -> Tensor:
    """Bytes: the scale, the row, the weight."""
    scale_R1 = rows_RC.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / _FP8_MAX
    parts = [_as(scale_R1, torch.uint8), _as((rows_RC.float() / scale_R1).to(_FP8), torch.uint8)]
    if weights_R is not None:
        parts.append(_as(weights_R.unsqueeze(1), torch.uint8))
    return torch.cat(parts, dim=1)


def _unpack_fp8(message: Tensor, format: _Format) -> tuple[Tensor, Tensor | None]:
    end = 4 + format.width
    rows = (_as(message[:, 4:end], _FP8).float() * _as(message[:, :4], torch.float32)).to(format.dtype)
    return rows, None if format.weight_dtype is None else _as(message[:, end:], format.weight_dtype).squeeze(1)


def _as(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of each row as another dtype."""
    # The view wants a last stride of 1, which `.contiguous()` does not give to rows of width 1 or to no rows.
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)
