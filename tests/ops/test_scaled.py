"""Rounding to 8 bits, bit by bit, and the products of such numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fp8_oracle import Q, round_rows
from torch import Tensor

from dmoe.ops import scaled


def hard_rows() -> Tensor:
    rows = torch.randn(14, 48)
    rows[0] = 0
    rows[1] *= 1e-30
    rows[2] *= 1e30
    rows[3, 5] = float("nan")
    rows[4, 5] = -float("inf")
    rows[5, 7] = 1e4  # an outlier: most of the others become zero or nearly
    rows[6] = 448 * 2.0**-3
    rows[7] = 450 * 2.0**-3
    rows[8] = 2.0**-130
    rows[9] = torch.arange(48) * 2.0**-9 * 1.5  # ties among the smallest numbers
    rows[9, 0] = 448
    rows[10, 1:] = 0
    rows[11] = -rows[11].abs()
    rows[12] = 17.0  # a tie of the mantissa
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rounding_equals_an_independent_one(dtype: torch.dtype) -> None:
    rows = hard_rows().to(dtype)
    got = scaled.quantise_rows(rows)
    assert got.values.dtype == torch.float8_e4m3fn
    assert got.scales.dtype == torch.float32
    want = round_rows(rows.double().numpy())
    np.testing.assert_array_equal((got.values.double() * got.scales.double()[:, None]).numpy(), want)
    finite = got.scales[got.scales.isfinite()]
    assert len(finite) == len(rows) - 2
    assert (torch.frexp(finite).mantissa == 0.5).all()
    used = got.values.double().abs().amax(1)[[2, 6, 7, 11]]
    assert used.tolist()[1:3] == [448, 224]
    assert ((used >= 224) & (used <= 448)).all()


def test_scale_of_nan_with_any_bits() -> None:
    """The sum of bits overflows for the largest ones."""
    nan = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001], dtype=torch.int32).view(torch.float32)
    assert scaled.scales_for(nan).isnan().all()


def test_rounding_of_columns_is_that_of_the_transposed_matrix() -> None:
    weights = torch.stack([hard_rows(), hard_rows().flip(1)]).bfloat16()
    got, want = scaled.quantise_columns(weights), scaled.quantise_rows(weights.transpose(1, 2).contiguous())
    assert got.values.is_contiguous()
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert torch.equal(got.scales.nan_to_num(7.0), want.scales.nan_to_num(7.0))


def test_a_weight_is_the_same_number_forward_and_backward() -> None:
    weights = (torch.randn(3, 64, 48) / 8).bfloat16()
    weights = torch.where(weights.abs() < 1e-3, 0, weights)  # the smallest numbers have fewer bits
    rows, columns = (
        scaled.dequantise(scaled.quantise_rows(weights)),
        scaled.dequantise(scaled.quantise_columns(weights)),
    )
    assert torch.equal(rows, columns.transpose(1, 2))


@pytest.mark.parametrize("sizes", [[3, 0, 9, 4], [0, 0, 0, 0], [0, 16, 0, 0]], ids=str)
def test_scaled_product(sizes: list[int]) -> None:
    rows, weights = torch.randn(sum(sizes), 32) * torch.logspace(-9, 9, sum(sizes))[:, None], torch.randn(4, 48, 32)
    offsets = torch.tensor(sizes).cumsum(0).int()
    got = scaled.scaled_product(scaled.quantise_rows(rows), scaled.quantise_rows(weights), offsets)
    expert = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    want = torch.einsum("rm,rnm->rn", Q(rows.double()), Q(weights.double())[expert])
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2.0**-8, atol=0)
