"""Tokens as rows for ranks where no kernel runs; the kernels are tested in `token_rows_cases.py`."""

import numpy as np
import pytest
import torch
from token_rows_oracle import expected_rows

from dmoe.ops.token_rows import rows_to_send, spread_token_rows, sum_token_rows, token_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("T", "K", "W", "e"), [(0, 2, 4, 2), (1, 1, 1, 1), (50, 3, 4, 2), (33, 8, 2, 8), (20, 4, 8, 1), (40, 2, 3, 5)]
)
def test_token_rows(T: int, K: int, W: int, e: int, dtype: torch.dtype) -> None:
    ids = torch.rand(T, W * e).argsort(1)[:, :K]
    ids[torch.rand(ids.shape) < 0.2] = W * e
    weights, x = torch.rand(T, K, dtype=dtype), torch.randn(T, 5, dtype=dtype)
    inverse, picks, counts = expected_rows(ids, weights, W, e)
    num_rows = len(picks)

    rows = token_rows(x, ids, weights, W, e)
    np.testing.assert_array_equal(rows.counts_W2, counts)
    np.testing.assert_array_equal(np.where(rows.inverse_TW.numpy() < num_rows, rows.inverse_TW, -1), inverse)
    x_RD, picks_RC = rows_to_send(rows, num_rows, x, ids, weights, e)
    np.testing.assert_array_equal(picks_RC, picks)
    tokens_R = np.array([np.nonzero(inverse == row)[0][0] for row in range(num_rows)], dtype=int)
    np.testing.assert_array_equal(x_RD, x.numpy()[tokens_R])

    assert torch.equal(spread_token_rows(x, rows.inverse_TW, rows.order_R, num_rows), x_RD)
    total = np.zeros((T, 5))
    np.add.at(total, tokens_R, x_RD.double().numpy())
    torch.testing.assert_close(sum_token_rows(x_RD, rows.inverse_TW).double(), torch.from_numpy(total))
