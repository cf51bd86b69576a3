"""Sorting picks and moving rows: the Triton kernels against numpy and against sums written out.

Run by `test_routing_kernels.py` in the interpreter and by `tests/gpu/test_routing_kernels_gpu.py` on a GPU.
"""

import numpy as np
import pytest
import torch
from interpreted import DEVICE
from torch import Tensor

from dmoe.ops import sort_by_expert, sum_picks
from dmoe.ops.kernels import sorting
from dmoe.ops.kernels.rows import spread_rows, sum_picks_triton
from dmoe.ops.kernels.sorting import counting_sort


def poison() -> None:
    """Leave freed memory full of NaN (as an integer: far out of range), so that what is not written shows."""
    kept = [torch.full((2**n,), float("nan"), device=DEVICE) for n in range(4, 21) for _ in range(2)]
    del kept


def some_ids(T: int, K: int, E: int, kind: str = "uniform") -> Tensor:
    scores = torch.rand(T, E)
    if kind == "skewed":  # a few experts get nearly all, most get none
        scores[:, : max(1, E // 4)] += torch.rand(max(1, E // 4)) * 2
    ids = scores.topk(K).indices
    if kind == "first":
        ids = torch.zeros_like(ids)
    elif kind == "last":
        ids = torch.full_like(ids, E - 1)
    return ids


def check_permutation(ids: Tensor, E: int, permutation: tuple[Tensor, Tensor, Tensor]) -> None:
    order, inverse, offsets = permutation
    flat = ids.cpu().numpy().ravel()
    want_order = np.argsort(flat, kind="stable")
    want_inverse = np.empty_like(want_order)
    want_inverse[want_order] = np.arange(flat.size)
    np.testing.assert_array_equal(order.cpu().numpy(), want_order)
    np.testing.assert_array_equal(inverse.cpu().numpy(), want_inverse.reshape(ids.shape))
    np.testing.assert_array_equal(offsets.cpu().numpy(), np.cumsum(np.bincount(flat, minlength=E)))
    assert {t.dtype for t in permutation} == {torch.int32}


SORTS = [
    (40, 2, 7), (1, 3, 3), (0, 2, 4), (33, 1, 64), (32, 1, 1), (31, 4, 4), (20, 8, 128), (9, 4, 1000), (3, 30, 1024),
]  # fmt: skip
KINDS = {"uniform": torch.int64, "skewed": torch.int32, "first": torch.int64, "last": torch.int32}


@pytest.mark.parametrize(("kind", "dtype"), KINDS.items(), ids=KINDS)
@pytest.mark.parametrize(("T", "K", "E"), SORTS)
def test_sort(T: int, K: int, E: int, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block; and in blocks of 32 rows, more than are added up at once."""
    monkeypatch.setattr(sorting, "_BLOCKS_AT_ONCE", 2)
    ids = some_ids(T, K, E, kind).to(DEVICE, dtype)
    for block in (32, 256):
        poison()
        check_permutation(ids, E, counting_sort(ids, E, block=block))


def test_sort_of_ids_that_are_not_contiguous() -> None:
    ids = some_ids(50, 4, 9).to(DEVICE)
    check_permutation(ids.t()[1:3].t(), 9, counting_sort(ids.t()[1:3].t(), 9))


def inverse_of(T: int, K: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randperm(T * K).view(T, K).to(DEVICE, dtype)


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = [(7, 3, 20), (5, 1, 64), (3, 8, 512), (3, 4, 1536), (2, 20, 40), (1, 17, 2050), (0, 2, 8), (4, 2, 1)]


def assert_same(got: Tensor, want: Tensor) -> None:
    """The same bits; or for bf16 in the interpreter, which cuts bits off instead of rounding, one unit apart."""
    if DEVICE == "cpu" and want.dtype == torch.bfloat16:
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
    else:
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "K", "D"), ROWS)
def test_sum_picks(T: int, K: int, D: int, dtype: torch.dtype) -> None:
    y = (torch.randn(T * K, D) * 100).to(DEVICE, dtype)
    inverse = inverse_of(T, K, torch.int64 if K == 3 else torch.int32)
    want = torch.zeros(T, D, device=DEVICE)
    for k in range(K):
        want += y[inverse[:, k].long()].float()
    want = want.to(dtype)
    poison()
    assert_same(sum_picks_triton(y, inverse), want)
    assert_same(sum_picks(y, inverse.long()), want)
    wide = torch.full((T, D + 8), float("nan"), device=DEVICE, dtype=dtype)
    assert sum_picks_triton(torch.cat([y, y], 1)[:, :D], inverse, out=wide[:, :D]).data_ptr() == wide.data_ptr()
    assert_same(wide[:, :D], want)
    assert wide[:, D:].isnan().all()  # nothing is written past the width


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "K", "D"), ROWS)
def test_spread_rows(T: int, K: int, D: int, dtype: torch.dtype) -> None:
    x = torch.randn(T, D).to(DEVICE, dtype)
    inverse = inverse_of(T, K, torch.int64 if K == 3 else torch.int32)
    want = torch.empty(T * K, D, device=DEVICE, dtype=dtype)
    for k in range(K):
        want[inverse[:, k].long()] = x
    poison()
    assert_same(spread_rows(x, inverse), want)
    padded = torch.full((T * K + 3, D + 8), float("nan"), device=DEVICE, dtype=dtype)
    spread_rows(torch.cat([x, x], 1)[:, :D], inverse, out=padded[:, :D])
    assert_same(padded[: T * K, :D], want)
    assert padded[T * K :].isnan().all()
    assert padded[:, D:].isnan().all()


def test_rows_of_a_sorted_batch() -> None:
    """Spreading puts each token where the permutation of the other backend gathers it from."""
    ids = some_ids(30, 3, 8).to(DEVICE)
    x = torch.randn(30, 24, device=DEVICE)
    order, inverse, _ = sort_by_expert(ids, 8)
    rows = spread_rows(x, counting_sort(ids, 8).inverse_TK)
    assert torch.equal(rows, x[order // 3])
    assert torch.equal(sum_picks_triton(rows, inverse), x + x + x)


def test_errors_of_rows() -> None:
    rows, inverse = torch.zeros(6, 4, device=DEVICE), inverse_of(3, 2)
    with pytest.raises(ValueError, match="bfloat16"):
        sum_picks_triton(rows, inverse, out=torch.zeros(3, 4, device=DEVICE, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"\[3, 5\]"):
        sum_picks_triton(rows, inverse, out=torch.zeros(3, 5, device=DEVICE))
    with pytest.raises(ValueError, match="contiguous"):
        sum_picks_triton(torch.zeros(4, 6, device=DEVICE).t(), inverse)
    with pytest.raises(ValueError, match="5 rows for 6 picks"):
        spread_rows(rows[:3], inverse, out=rows[:5])
