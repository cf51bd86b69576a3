"""Matrices of 8-bit numbers with a scale for each row: rounding to them, and their products by groups of rows.

Numbers are float8_e4m3fn, and a row, along the dimension that a product contracts, has an fp32 scale taken from it.

* Scales are powers of two. What a number is rounded to then does not depend on what else is in its row (but for the
  smallest ones), so a matrix and its transpose, rounded along different dimensions, hold the same numbers. And a number
  times its scale is exact in bf16, which is how other devices than Hopper GPUs compute the same products.
* Rows have scales of their own, so a token's result does not depend on the batch.

Legend: R rows, M contracted width, N output width, E experts, T tokens, K picks.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.platform import is_hopper, runs_triton
from dmoe.ops.products import rows_times_weights

E4M3 = torch.float8_e4m3fn
# The product of 8-bit numbers addresses rows in units of 16 bytes.
ALIGNMENT = 16
# Hopper's tensor cores add 8-bit products with about 14 bits of precision. False moves partial sums to fp32 registers
# every 128 terms; true is faster. (DeepSeek-V3, arXiv:2412.19437, section 3.3.2)
FAST_ACCUMULATION = False


class Scaled(NamedTuple):
    """A matrix, or one for each expert, in 8 bits: entry [..., i, j] stands for values[..., i, j] * scales[..., i]."""

    values: Tensor
    """[..., N, M] float8_e4m3fn, M the contracted dimension."""
    scales: Tensor
    """[..., N] fp32, powers of two; NaN for a row with a number that is not finite, which then is NaN as a whole."""


def fused_kernels(t: Tensor) -> ModuleType | None:
    """`dmoe.ops.kernels.fp8` on a Hopper GPU with Triton; the expressions beside each use are what they compute."""
    if not (is_hopper(t.device) and runs_triton(t.device)):
        return None
    from dmoe.ops.kernels import fp8

    return fp8


def scales_for(amax: Tensor) -> Tensor:
    """fp32 powers of two: the smallest s with amax <= 448 s, at least 2**-126. Exact, without a division."""
    bits = amax.float().clamp_min(2.0**-118).view(torch.int32)
    # 448 is 1.75 * 2**8: adding a quarter less one carries into the exponent exactly where the mantissa is above 1.75.
    scales = ((bits + 0x1FFFFF) & ~0x7FFFFF).view(torch.float32) * 2.0**-8
    return torch.where(amax < torch.inf, scales, torch.nan)


def quantise_rows(rows: Tensor) -> Scaled:
    """`rows` [..., N, M], contiguous, in 8 bits, with a scale for each of the N rows."""
    kernels = fused_kernels(rows)
    if kernels is not None:
        return Scaled(*kernels.quantise_rows(rows))
    scales = scales_for(torch.linalg.vector_norm(rows, torch.inf, dim=-1))
    return Scaled((rows.float() * scales.reciprocal().unsqueeze(-1)).to(E4M3), scales)


def quantise_picks(x_TD: Tensor, tokens_R: Tensor, inverse_TK: Tensor) -> Scaled:
    """The token of each sorted row in 8 bits, [R, D]. A token is rounded once, however many rows it has.

    Args:
        tokens_R: the token of each row.
        inverse_TK: the rows of each token, R for none. The kernel, to which groups are never padded, leaves the others
            undefined.
    """
    kernels = fused_kernels(x_TD)
    if kernels is not None:
        return Scaled(*kernels.quantise_rows(x_TD, inverse_TK))
    x = quantise_rows(x_TD)
    values = x.values.view(torch.uint8).index_select(0, tokens_R).view(E4M3)
    return Scaled(values, x.scales.index_select(0, tokens_R))


def quantise_columns(weights_EMN: Tensor) -> Scaled:
    """The transposed matrices in 8 bits: values [E, N, M], a scale for each of the N columns of `weights_EMN`."""
    kernels = fused_kernels(weights_EMN)
    if kernels is not None:
        return Scaled(*kernels.quantise_columns(weights_EMN))
    scales = scales_for(torch.linalg.vector_norm(weights_EMN, torch.inf, dim=1))
    values_EMN = (weights_EMN.float() * scales.reciprocal().unsqueeze(1)).to(E4M3)
    return Scaled(values_EMN.transpose(1, 2).contiguous(), scales)


def dequantise(t: Scaled, out: Tensor | None = None) -> Tensor:
    """bf16, exact: 4 significant bits times a power of two."""
    return torch.mul(t.values.bfloat16(), t.scales.bfloat16().unsqueeze(-1), out=out)


def scaled_product(
    rows: Scaled, weights: Scaled, offsets_E: Tensor, batch: bool = False, *, zero_row: bool = False
) -> Tensor:
    """[R, N] bf16: each expert's rows [R, M] times its weights [E, N, M], transposed, with fp32 accumulation.

    On a Hopper GPU torch's product of 8-bit numbers; elsewhere the same numbers in bf16, so that only the order of the
    sums differs. Rows after the last expert's are undefined. With `zero_row` there is one row more, of zeros.
    """
    num_rows, width = rows.values.shape
    if not is_hopper(rows.values.device):
        x = rows.scales.new_empty(num_rows + zero_row, width, dtype=torch.bfloat16)
        dequantise(rows, out=x[:num_rows])
        y = rows_times_weights(x, dequantise(weights).transpose(1, 2), offsets_E, batch)
        y[num_rows:].zero_()
        return y
    if num_rows == 0:
        return rows.scales.new_zeros(int(zero_row), weights.values.shape[1], dtype=torch.bfloat16)
    y = F.scaled_grouped_mm(  # type: ignore[attr-defined]
        rows.values, weights.values.transpose(1, 2), rows.scales, F.ScalingType.RowWise, weights.scales,
        F.ScalingType.RowWise, offs=offsets_E, output_dtype=torch.bfloat16, use_fast_accum=FAST_ACCUMULATION,
    )  # fmt: skip
    return F.pad(y, (0, 0, 0, 1)) if zero_row else y
