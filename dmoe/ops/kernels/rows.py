"""Rows between token order and expert order: the sum of a token's K rows, and a token copied to its K rows.

Both go through the inverse permutation with one program a token and a part of its width, so that a token's own row is
read or written once and no row twice. The sum of rows is what the combine of the forward and the gradient of x need;
spreading is its transpose and replaces a gather, which would read every token K times. An index that is no row's, R or
more, is that of a pick of no expert: it is skipped.

Legend: T tokens, D width, K picks, R = T*K rows sorted by expert.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 2048  # columns of a program: 16 a thread, two loads of 16 bytes of a half-precision row
_MIN_BLOCK = 512
_UNROLL = 16  # up to this many picks, all loads of a token are in flight together


@triton.jit
def _token_and_columns(width, parts, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    columns = program % parts * BLOCK + tl.arange(0, BLOCK)
    return (program // parts).to(tl.int64), columns, columns < width


@triton.jit(do_not_specialize=["num_rows"])
def _sum_picks(
    y_ptr, inverse_ptr, out_ptr, y_stride, out_stride, width, num_rows, parts,
    TOP_K: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, columns, mask = _token_and_columns(width, parts, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.range(0, TOP_K, loop_unroll_factor=UNROLL):
        # Rows times width can pass 2**31.
        row = tl.load(inverse_ptr + token * TOP_K + k).to(tl.int64)
        total += tl.load(y_ptr + row * y_stride + columns, mask=mask & (row < num_rows), other=0.0).to(tl.float32)
    tl.store(out_ptr + token * out_stride + columns, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _spread_rows(
    x_ptr, inverse_ptr, out_ptr, x_stride, out_stride, width, num_rows, parts,
    TOP_K: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, columns, mask = _token_and_columns(width, parts, BLOCK)
    x = tl.load(x_ptr + token * x_stride + columns, mask=mask)
    for k in tl.range(0, TOP_K, loop_unroll_factor=UNROLL):
        row = tl.load(inverse_ptr + token * TOP_K + k).to(tl.int64)
        tl.store(out_ptr + row * out_stride + columns, x, mask=mask & (row < num_rows))


def sum_picks_triton(y_RD: Tensor, inverse_TK: Tensor, out: Tensor | None = None) -> Tensor:
    """y_TD[t] = sum over k of y_RD[inverse_TK[t, k]], added in the order of k with fp32 accumulation.

    The bits of `dmoe.ops.sum_picks`, in one pass over the rows. Not differentiable.

    Args:
        y_RD: fp32, bf16 or fp16, last dimension contiguous.
        inverse_TK: int32 or int64; R or more adds nothing.
        out: [T, D] of the dtype of y_RD, to write to.
    """
    num_tokens, top_k = inverse_TK.shape
    width = y_RD.shape[1]
    y_TD = y_RD.new_empty(num_tokens, width) if out is None else out
    _check_rows(y_RD, y_TD)
    if top_k == 0:
        return y_TD.zero_()
    if num_tokens and width:
        grid, sizes = _launch(num_tokens, top_k, width)
        strides = y_RD.stride(0), y_TD.stride(0)
        _sum_picks[grid](y_RD, inverse_TK.contiguous(), y_TD, *strides, width, y_RD.shape[0], **sizes)
    return y_TD


def spread_rows(x_TD: Tensor, inverse_TK: Tensor, out: Tensor | None = None, *, num_rows: int | None = None) -> Tensor:
    """x_RD[inverse_TK[t, k]] = x_TD[t]. Not differentiable.

    Args:
        x_TD: last dimension contiguous.
        inverse_TK: int32 or int64, no row twice; as many as the result has rows, or more, names none.
        out: [R or more, D] of the dtype of x_TD; rows that inverse_TK does not name are left as they are.
        num_rows: without `out`: rows of the result, where inverse_TK names fewer than R.
    """
    num_tokens, top_k = inverse_TK.shape
    width = x_TD.shape[1]
    num_rows = num_tokens * top_k if num_rows is None else num_rows
    x_RD = x_TD.new_empty(num_rows, width) if out is None else out
    _check_rows(x_TD, x_RD)
    if out is not None and x_RD.shape[0] < num_tokens * top_k:
        raise ValueError(f"out has {x_RD.shape[0]} rows for {num_tokens * top_k} picks")
    if num_tokens and top_k and width:
        grid, sizes = _launch(num_tokens, top_k, width)
        strides = x_TD.stride(0), x_RD.stride(0)
        _spread_rows[grid](x_TD, inverse_TK.contiguous(), x_RD, *strides, width, x_RD.shape[0], **sizes)
    return x_RD


def _check_rows(source: Tensor, out: Tensor) -> None:
    if out.dtype != source.dtype or out.shape[1] != source.shape[1]:
        raise ValueError(f"out is {list(out.shape)} {out.dtype}, the rows are {list(source.shape)} {source.dtype}")
    if source.numel() and out.numel() and (source.stride(1) != 1 or out.stride(1) != 1):
        raise ValueError(f"the last dimension must be contiguous, got strides {source.stride()} and {out.stride()}")


def _launch(num_tokens: int, top_k: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    block = min(_MAX_BLOCK, triton.next_power_of_2(width))
    while block > _MIN_BLOCK and width % block:
        block //= 2
    parts = triton.cdiv(width, block)
    unroll = top_k if top_k <= _UNROLL else 8
    return (num_tokens * parts,), {
        "parts": parts, "TOP_K": top_k, "UNROLL": unroll, "BLOCK": block, "num_warps": max(1, block // 512),
    }  # fmt: skip
