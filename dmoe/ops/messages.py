"""Messages of rows between ranks: their bytes, their sending and their arrival. Nothing here is differentiable.

Legend: R rows here, S rows after the exchange, C row width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

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


class Format(NamedTuple):
    """What a message holds, and to whom it goes. The gradients that come back for it are "same" or bf16."""

    splits: Splits
    group_name: str
    payload: str
    width: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None = None

    @property
    def grad_dtype(self) -> torch.dtype:
        """Of the elements of a message, fp8 aside, and of one of gradients."""
        return self.dtype if self.payload == "same" else torch.bfloat16

    @property
    def weight_width(self) -> int:
        """Columns that a weight takes in a message of `grad_dtype`."""
        if self.weight_dtype is None:
            return 0
        return 1 if self.weight_dtype == self.grad_dtype else self.weight_dtype.itemsize


def ticket_for(rows_RC: Tensor, format: Format) -> Tensor:
    """Stands for a message in the graph and takes no memory. It has the shape and dtype of the message of gradients
    that comes back, as autograd wants, and is not read."""
    ticket = rows_RC.new_empty(1, 1, dtype=format.grad_dtype)
    return ticket.expand(rows_RC.shape[0], format.width + format.weight_width)


def send(rows_RC: Tensor, weights_R: Tensor | None, format: Format) -> Tensor:
    """Start to send rows, each with its weight if the format has one; give the result to `receive`."""
    pack = _pack_fp8 if format.payload == "fp8" else _pack
    return _send(pack(rows_RC, weights_R, format), format.splits, format.group_name)


def receive(message: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """(rows [S, C], weights [S] or None) of what `send` started, in the dtypes that were sent. Waits."""
    unpack = _unpack_fp8 if format.payload == "fp8" else _unpack
    return unpack(wait(message), format)


def send_back(grad_SC: Tensor, grad_S: Tensor | None, format: Format) -> Tensor:
    """Start to send the gradients of rows that came with this format. The result is the gradient of the `ticket_for`
    their message; give it to `receive_back`."""
    message = _send(_pack(grad_SC, grad_S, format), format.splits.reversed(), format.group_name)
    # Anomaly detection reads what a backward returns. (It cannot be asked for inside the compiler.)
    is_read = not torch.compiler.is_compiling() and torch.is_anomaly_enabled()
    return wait(message) if is_read else message


def receive_back(message: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    """The gradients of the rows and weights that were sent. Waits."""
    return _unpack(wait(message), format)


def _send(message: Tensor, splits: Splits, group_name: str) -> Tensor:
    """Start the collective; the result may be read after `wait`. An operator that the compiler knows."""
    return torch.ops._c10d_functional.all_to_all_single(message, splits.receive, splits.send, group_name)


def wait(message: Tensor) -> Tensor:
    """For a message; what follows on the current stream may then read it."""
    return torch.ops._c10d_functional.wait_tensor(message)


def _pack(rows_RC: Tensor, weights_R: Tensor | None, format: Format) -> Tensor:
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


def _unpack(message: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    if format.weight_dtype is None:
        return message.to(format.dtype), None
    rows, weights = message[:, : format.width].to(format.dtype), message[:, format.width :]
    if format.weight_dtype != format.grad_dtype:
        columns = _as(weights, _INTEGERS[format.grad_dtype.itemsize]).to(torch.uint8)
        weights = columns.view(format.weight_dtype)
    return rows.contiguous(), weights.flatten()


def _pack_fp8(rows_RC: Tensor, weights_R: Tensor | None, format: Format) -> Tensor:
    """Bytes: the scale, the row, the weight."""
    scale_R1 = rows_RC.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / _FP8_MAX
    parts = [_as(scale_R1, torch.uint8), _as((rows_RC.float() / scale_R1).to(_FP8), torch.uint8)]
    if weights_R is not None:
        parts.append(_as(weights_R.unsqueeze(1), torch.uint8))
    return torch.cat(parts, dim=1)


def _unpack_fp8(message: Tensor, format: Format) -> tuple[Tensor, Tensor | None]:
    end = 4 + format.width
    rows = (_as(message[:, 4:end], _FP8).float() * _as(message[:, :4], torch.float32)).to(format.dtype)
    return rows, None if format.weight_dtype is None else _as(message[:, end:], format.weight_dtype).squeeze(1)


def _as(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of each row as another dtype."""
    # The view wants a last stride of 1, which `.contiguous()` does not give to rows of width 1 or to no rows.
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)
