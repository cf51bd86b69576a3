"""Rounding to 8 bits with a scale for each row, fused with what comes before it.

What the numbers are is defined in `dmoe.ops.scaled`, and the steps in `dmoe.ops.fp8`, whose expressions these kernels
follow bit by bit, but for the last bits of the activation. A program holds a whole row in registers, so that it is read
once, although nothing of it can be written before its largest magnitude is known.

Legend: T tokens, K picks, R rows, M contracted width, E experts, F expert width, H = 2F (gated) or F.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe.ops.kernels.activations import gated, gated_with_derivative, pointwise, pointwise_with_derivative

# Of a matrix that is transposed: rows of 128 bytes are read, of 256 written.
_TILE_M, _TILE_N = 256, 64
_E4M3 = torch.float8_e4m3fn


@triton.jit
def _magnitude(x):
    """The bits of |x|, fp32: they order like numbers, infinity above all numbers and NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_and_inverse(magnitude):
    """The scale for the largest magnitude of a row, a power of two or NaN, and its inverse."""
    bits = (tl.maximum(magnitude, 0x04800000) + 0x1FFFFF) & 0x7F800000  # at least 2**-118
    bits -= 0x04000000  # / 2**8
    finite = magnitude < 0x7F800000
    bits = tl.where(finite, bits, 0x7FC00000)
    inverse = tl.where(finite, 0x7F000000 - bits, 0x7FC00000)
    return bits.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_places"])
def _quantise_rows(
    rows, inverse, values, scales, M, num_places, TOP_K: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr
):
    """One program a row, written to one place, or with `inverse` to TOP_K of them, but for those beyond the last."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < M
    x = tl.load(rows + row * M + columns, mask=mask, other=0.0).to(tl.float32)
    scale, inverse_scale = _scale_and_inverse(tl.max(_magnitude(x), axis=0))
    y = (x * inverse_scale).to(tl.float8e4nv)
    for k in tl.range(0, TOP_K, loop_unroll_factor=UNROLL):
        place = row
        if inverse is not None:
            place = tl.load(inverse + row * TOP_K + k).to(tl.int64)
        tl.store(scales + place, scale, mask=place < num_places)
        tl.store(values + place * M + columns, y, mask=mask & (place < num_places))


@triton.jit
def _quantise_columns(weights, values, scales, M, N, TILE_M: tl.constexpr, TILE_N: tl.constexpr):
    """One program TILE_N columns of an expert's [M, N] matrix, written transposed. They are read twice, the second time
    from the cache while it holds what all programs read."""
    expert = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    in_n = n < N
    weights += expert * M * N
    values += expert * M * N
    largest = tl.zeros([TILE_M, TILE_N], tl.int32)
    for start in range(0, M, TILE_M):
        m = start + tl.arange(0, TILE_M)
        inside = (m < M)[:, None] & in_n[None, :]
        x = tl.load(weights + m[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0.0)
        largest = tl.maximum(largest, _magnitude(x.to(tl.float32)))
    scale, inverse = _scale_and_inverse(tl.max(largest, axis=0))
    tl.store(scales + expert * N + n, scale, mask=in_n)
    for start in range(0, M, TILE_M):
        m = start + tl.arange(0, TILE_M)
        inside = (m < M)[:, None] & in_n[None, :]
        x = tl.load(weights + m[:, None].to(tl.int64) * N + n[None, :], mask=inside, other=0.0)
        y = tl.trans((x.to(tl.float32) * inverse[None, :]).to(tl.float8e4nv))
        inside = in_n[:, None] & (m < M)[None, :]
        tl.store(values + n[:, None].to(tl.int64) * M + m[None, :], y, mask=inside)


@triton.jit
def _add_bias(h, bias, columns, mask):
    """h at `columns`, fp32, after the bias has been added to it in memory."""
    x = tl.load(h + columns, mask=mask, other=0.0)
    if bias is not None:
        x = (x.to(tl.float32) + tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(h + columns, x, mask=mask)
    return x.to(tl.float32)


@triton.jit
def _activate_rows(
    h, bias, experts, weights, values, scales, end, F, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr
):
    """h += bias of the row's expert; values, scales = Q(weight * act(h)). One program a row, up to the row `end`."""
    row = tl.program_id(0).to(tl.int64)
    if end is not None:  # noqa: SIM102 - the compiler decides this, the program the next
        if row >= tl.load(end):
            return
    H = F * (2 if GATED else 1)
    h += row * H
    if bias is not None:
        bias += tl.load(experts + row).to(tl.int64) * H
    columns = tl.arange(0, BLOCK)
    mask = columns < F
    gate = _add_bias(h, bias, columns, mask)
    if GATED:
        a = gated(gate, _add_bias(h, bias, F + columns, mask), ACT)
    else:
        a = pointwise(gate, ACT)
    a *= tl.load(weights + row)
    scale, inverse = _scale_and_inverse(tl.max(tl.where(mask, _magnitude(a), 0), axis=0))
    tl.store(scales + row, scale)
    tl.store(values + row * F + columns, (a * inverse).to(tl.float8e4nv), mask=mask)


@triton.jit
def _activate_backward_rows(
    grad_a, h, weights, grad_h, a, grad_s, values, scales, end, F,
    ACT: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_h, a = weight * act(h) in bf16, grad_s = <grad_a, act(h)>, values, scales = Q(grad_h). One program a row, up
    to the row `end`."""
    row = tl.program_id(0).to(tl.int64)
    if end is not None:  # noqa: SIM102 - the compiler decides this, the program the next
        if row >= tl.load(end):
            return
    H = F * (2 if GATED else 1)
    h += row * H
    grad_h += row * H
    values += row * H
    columns = tl.arange(0, BLOCK)
    mask = columns < F
    weight = tl.load(weights + row)
    g = tl.load(grad_a + row * F + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(h + columns, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(h + F + columns, mask=mask, other=0.0).to(tl.float32)
        act, grad_gate, grad_up = gated_with_derivative(gate, up, g * weight, ACT)
    else:
        act, slope = pointwise_with_derivative(gate, ACT)
        grad_gate = g * weight * slope
    tl.store(a + row * F + columns, (act * weight).to(tl.bfloat16), mask=mask)
    tl.store(grad_s + row, tl.sum(tl.where(mask, g * act, 0.0), axis=0))
    # What is rounded to 8 bits is what the weight gradient reads.
    grad_gate = grad_gate.to(tl.bfloat16)
    tl.store(grad_h + columns, grad_gate, mask=mask)
    grad_gate = grad_gate.to(tl.float32)
    largest = tl.where(mask, _magnitude(grad_gate), 0)
    if GATED:
        grad_up = grad_up.to(tl.bfloat16)
        tl.store(grad_h + F + columns, grad_up, mask=mask)
        grad_up = grad_up.to(tl.float32)
        largest = tl.maximum(largest, tl.where(mask, _magnitude(grad_up), 0))
    scale, inverse = _scale_and_inverse(tl.max(largest, axis=0))
    tl.store(scales + row, scale)
    tl.store(values + columns, (grad_gate * inverse).to(tl.float8e4nv), mask=mask)
    if GATED:
        tl.store(values + F + columns, (grad_up * inverse).to(tl.float8e4nv), mask=mask)


def _sizes(width: int) -> dict[str, int]:
    """A row in registers: 8 numbers a thread, more of them for wide rows."""
    block = max(128, triton.next_power_of_2(width))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def _end(offsets_E: Tensor | None) -> Tensor | None:
    """The end of the last expert's rows, on the device."""
    return None if offsets_E is None else offsets_E[-1:]


def quantise_rows(rows: Tensor, inverse_TK: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """values and scales of `rows` [..., N, M] contiguous; with `inverse_TK`, T = N, each at the K rows [R, M] it names.

    Args:
        inverse_TK: int32 or int64, no row twice; R names none. Rows that it does not name are undefined.
    """
    shape = rows.shape if inverse_TK is None else (inverse_TK.numel(), rows.shape[-1])
    values, scales = rows.new_empty(shape, dtype=_E4M3), rows.new_empty(shape[:-1], dtype=torch.float32)
    top_k = 1 if inverse_TK is None else inverse_TK.shape[1]
    if values.numel():
        _quantise_rows[(rows.numel() // rows.shape[-1],)](
            rows, inverse_TK, values, scales, rows.shape[-1], scales.numel(),
            TOP_K=top_k, UNROLL=min(top_k, 8), **_sizes(rows.shape[-1]),
        )  # fmt: skip
    return values, scales


def quantise_columns(weights_EMN: Tensor) -> tuple[Tensor, Tensor]:
    """values [E, N, M] and scales [E, N] of the transposed matrices; `weights_EMN` contiguous."""
    num_experts, m, n = weights_EMN.shape
    values = weights_EMN.new_empty(num_experts, n, m, dtype=_E4M3)
    scales = weights_EMN.new_empty(num_experts, n, dtype=torch.float32)
    # Programs of many warps, so that few run at once and what they read stays in the cache.
    _quantise_columns[(triton.cdiv(n, _TILE_N), num_experts)](
        weights_EMN, values, scales, m, n, TILE_M=_TILE_M, TILE_N=_TILE_N, num_warps=32
    )
    return values, scales


def activate_rows(
    h_RH: Tensor, bias_EH: Tensor | None, experts_R: Tensor, scale_R1: Tensor, activation: str, is_gated: bool,
    offsets_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """values [R, F] and scales [R] of the activation times the routing weight; the bias is first added to `h_RH`.

    With `offsets_E` rows after the last expert's are left out, and undefined.
    """
    num_rows, width = h_RH.shape[0], h_RH.shape[1] // (2 if is_gated else 1)
    values, scales = h_RH.new_empty(num_rows, width, dtype=_E4M3), scale_R1.new_empty(num_rows)
    if num_rows:
        _activate_rows[(num_rows,)](
            h_RH, bias_EH, experts_R, scale_R1, values, scales, _end(offsets_E), width,
            ACT=activation, GATED=is_gated, **_sizes(width),
        )  # fmt: skip
    return values, scales


def activate_backward_rows(
    grad_a_RF: Tensor, h_RH: Tensor, scale_R1: Tensor, activation: str, is_gated: bool, offsets_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad_h [R, H] and a [R, F] in bf16, grad_s [R], and values [R, H] and scales [R] of grad_h; as above."""
    num_rows, width = grad_a_RF.shape
    grad_h, a, values = torch.empty_like(h_RH), torch.empty_like(grad_a_RF), torch.empty_like(h_RH, dtype=_E4M3)
    grad_s, scales = scale_R1.new_empty(num_rows), scale_R1.new_empty(num_rows)
    if num_rows:
        _activate_backward_rows[(num_rows,)](
            grad_a_RF, h_RH, scale_R1, grad_h, a, grad_s, values, scales, _end(offsets_E), width,
            ACT=activation, GATED=is_gated, **_sizes(width),
        )  # fmt: skip
    return grad_h, a, grad_s, values, scales
