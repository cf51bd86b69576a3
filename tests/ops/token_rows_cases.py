"""Tokens as rows for ranks: the two kernels against loops written out.

Run by `test_routing_kernels.py` in the interpreter and by `tests/gpu/test_routing_kernels_gpu.py` on a GPU.
"""

import numpy as np
import pytest
import torch
from interpreted import DEVICE
from rows_kernel_cases import poison, some_ids
from token_rows_oracle import expected_rows
from torch import Tensor

from dmoe.ops.kernels import token_rows as kernels
from dmoe.ops.kernels.token_rows import rows_by_rank


def check_rows(ids: Tensor, weights: Tensor, num_ranks: int, num_local: int) -> None:
    poison()
    inverse, picks, counts = rows_by_rank(ids, weights, num_ranks, num_local)
    want_inverse, want_picks, want_counts = expected_rows(ids.cpu(), weights.cpu(), num_ranks, num_local)
    num_rows, most = len(want_picks), ids.shape[0] * min(num_ranks, ids.shape[1])
    assert picks.shape == (most, 2 * ids.shape[1])
    np.testing.assert_array_equal(picks[:num_rows].cpu().numpy(), want_picks)
    np.testing.assert_array_equal(counts.cpu().numpy(), want_counts)
    np.testing.assert_array_equal(inverse.cpu().numpy(), np.where(want_inverse < 0, most, want_inverse))
    assert (inverse.dtype, counts.dtype) == (torch.int32, torch.int64)


# T, K, ranks, experts of a rank
SIZES = [(1, 1, 1, 1), (50, 3, 4, 2), (33, 8, 2, 8), (20, 4, 8, 1), (40, 2, 3, 5), (17, 6, 6, 1), (9, 12, 2, 10)]
KINDS = ["uniform", "skewed", "first", "last", "none"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "K", "W", "e"), SIZES)
def test_rows_by_rank(T: int, K: int, W: int, e: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of 16 tokens, more than are added up at once; "none": a fifth of the picks are of no expert."""
    monkeypatch.setattr(kernels, "_MAX_TOKENS", 16)
    monkeypatch.setattr(kernels, "_BLOCKS_AT_ONCE", 2)
    ids = some_ids(T, K, W * e, "uniform" if kind == "none" else kind)
    if kind == "none":
        ids[torch.rand(ids.shape) < 0.2] = W * e
        ids[: T // 3] = W * e
    check_rows(ids.to(DEVICE, torch.int32 if K % 2 else torch.int64), torch.rand(T, K).to(DEVICE), W, e)


def test_rows_of_ids_that_are_not_contiguous() -> None:
    ids, weights = some_ids(50, 4, 8).to(DEVICE), torch.rand(50, 4).to(DEVICE)
    check_rows(ids.t()[1:3].t(), weights.t()[1:3].t(), 4, 2)
