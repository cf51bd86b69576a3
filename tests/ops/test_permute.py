"""Sorting picks by expert and summing them back, against numpy."""

import numpy as np
import pytest
import torch

from dmoe.ops.permute import gather_rows, pad_groups, sort_by_expert, sum_picks, sum_rows


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(40, 2, 7), (1, 3, 3), (0, 2, 4), (33, 1, 64)])
def test_sort_by_expert(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> None:
    ids = torch.rand(tokens, experts).topk(top_k).indices.to(dtype)
    order, inverse, offsets = sort_by_expert(ids, experts)
    flat = ids.numpy().ravel()
    want_order = np.argsort(flat, kind="stable")
    np.testing.assert_array_equal(order.numpy(), want_order)
    want_inverse = np.empty_like(want_order)
    want_inverse[want_order] = np.arange(flat.size)
    np.testing.assert_array_equal(inverse.numpy(), want_inverse.reshape(tokens, top_k))
    np.testing.assert_array_equal(offsets.numpy(), np.cumsum(np.bincount(flat, minlength=experts)))
    assert (order.dtype, inverse.dtype, offsets.dtype) == (torch.int64, torch.int64, torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_picks_adds_in_the_order_of_k(dtype: torch.dtype) -> None:
    rows = (torch.randn(300, 5) * 100).to(dtype)
    inverse = torch.randperm(300).view(100, 3)
    picked = rows.float().numpy()[inverse.numpy()]  # [T, K, D]
    want = torch.from_numpy((picked[:, 0] + picked[:, 1]) + picked[:, 2])
    got = sum_picks(rows, inverse)
    if dtype == torch.float32:
        assert torch.equal(got, want)
    # Half a unit in the last of bf16's 8 bits: one rounding of the fp32 sum. (Ties may round either way.)
    assert ((got.float() - want).abs() <= want.abs() * 2**-8).all()


def test_sum_picks_of_nothing() -> None:
    assert sum_picks(torch.empty(0, 5), torch.empty(0, 2, dtype=torch.int64)).shape == (0, 5)
    zero = sum_picks(torch.empty(0, 5), torch.empty(3, 0, dtype=torch.int64))
    assert torch.equal(zero, torch.zeros(3, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 16, 129])
def test_sum_picks_has_the_same_bits_whatever_the_batch(width: int, dtype: torch.dtype) -> None:
    rows = (torch.randn(64, width) * 100).to(dtype)
    inverse = torch.randperm(64).view(32, 2)
    whole = sum_picks(rows, inverse)
    for n in (1, 2, 3, 5, 8, 17, 31):
        assert torch.equal(sum_picks(rows, inverse[:n]), whole[:n])


@pytest.mark.parametrize("sizes", [[4, 4, 4, 4, 4], [2, 3, 1, 8, 0], [2, 2, 0, 4, 0]])
def test_pad_groups(sizes: list[int]) -> None:
    """An expert's rows stay in order at the start of its group; the others pad; the inverse finds every pick."""
    ids_TK = torch.tensor([[1, 3], [3, 0], [3, 1], [0, 3]])
    order_R, inverse_TK, offsets_E = pad_groups(sort_by_expert(ids_TK, 5), torch.tensor(sizes))
    picks = {0: [3, 6], 1: [0, 5], 3: [1, 2, 4, 7]}
    want = [picks.get(e, []) + [8] * (size - len(picks.get(e, []))) for e, size in enumerate(sizes)]
    assert order_R.tolist() == [row for group in want for row in group]
    assert offsets_E.tolist() == np.cumsum(sizes).tolist()
    assert torch.equal(order_R[inverse_TK].flatten(), torch.arange(8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(40, 2, 7), (1, 3, 3), (0, 2, 4), (33, 1, 64), (9, 5, 5)])
def test_gather_rows_and_sum_rows(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> None:
    """Values and gradients against indexing in plain torch."""
    permutation = sort_by_expert(torch.rand(tokens, experts).topk(top_k).indices, experts)
    x = torch.randn(tokens, 6, dtype=dtype).requires_grad_()
    rows = gather_rows(x, permutation)
    assert torch.equal(rows, x[permutation.order_R // top_k])
    rows_grad = torch.randn_like(rows)
    rows.backward(rows_grad)
    want = rows_grad.double()[permutation.inverse_TK].sum(1).to(dtype)
    torch.testing.assert_close(x.grad, want)

    y = torch.randn(tokens * top_k, 6, dtype=dtype).requires_grad_()
    total = sum_rows(y, permutation)
    assert total.dtype == dtype
    torch.testing.assert_close(total, y.detach().double()[permutation.inverse_TK].sum(1).to(dtype))
    grad = torch.randn_like(total)
    total.backward(grad)
    assert torch.equal(y.grad, grad[permutation.order_R // top_k])


def test_sum_rows_undoes_gather_rows() -> None:
    permutation = sort_by_expert(torch.rand(50, 8).topk(4).indices, 8)
    x = torch.randn(50, 3)
    assert torch.equal(sum_rows(gather_rows(x, permutation), permutation), 4 * x)  # doubling twice is exact


def test_gather_rows_is_a_gradient_of_sum_rows() -> None:
    permutation = sort_by_expert(torch.rand(5, 4).topk(2).indices, 4)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    y = torch.randn(10, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: gather_rows(t, permutation), x)
    assert torch.autograd.gradcheck(lambda t: sum_rows(t, permutation), y)
