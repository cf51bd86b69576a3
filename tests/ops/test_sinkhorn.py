"""Sinkhorn's normalisation against what characterises it, against a loop in numpy, and over gloo ranks."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from dmoe.errors import ConfigError
from dmoe.ops import choose_topk, count_tokens_per_expert, sinkhorn

sys.path.insert(0, str(Path(__file__).parent))
import sinkhorn_worker


def loop(logits: np.ndarray, tolerance: float, limit: int = 10**6) -> tuple[np.ndarray, int]:
    T, E = logits.shape
    cost, columns = np.exp(logits), np.ones(E)
    count, change = 0, np.inf
    while change > tolerance and count < limit:
        count += 1
        rows = np.array([1 / (T * (cost[t] * columns).sum()) for t in range(T)])
        before, columns = columns, np.array([1 / (E * (cost[:, e] * rows).sum()) for e in range(E)])
        change = np.abs(columns - before).mean()
    return rows[:, None] * cost * columns, count


@pytest.mark.parametrize(("T", "E", "scale"), [(40, 8, 1.0), (30, 7, 3.0), (1, 5, 1.0), (9, 1, 2.0), (4, 12, 2.0)])
def test_stop_test_against_a_loop(T: int, E: int, scale: float) -> None:
    logits = torch.randn(T, E, dtype=torch.float64) * scale
    counts = []
    for tolerance in (0.3, 1e-2, 1e-4):
        want, count = loop(logits.numpy(), tolerance)
        got = sinkhorn(logits, tolerance=tolerance)
        counts.append(count)
        assert (got.dtype, got.shape) == (torch.float32, (T, E))
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-6)
    assert counts[0] < counts[2] or E == 1 or T == 1
    want, _ = loop(logits.numpy(), 0.0, limit=2)
    np.testing.assert_allclose(sinkhorn(logits, tolerance=0.0, max_iterations=2).numpy(), want, rtol=1e-6)


def test_sums_and_form() -> None:
    """At the limit: rows sum to 1 / T, columns to 1 / E, and the logarithm is the logits plus a row and a column."""
    logits = torch.randn(30, 7) * 2 + torch.linspace(-4, 4, 7)
    got = sinkhorn(logits, tolerance=1e-9).double()
    torch.testing.assert_close(got.sum(1), torch.full((30,), 1 / 30, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(got.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64), rtol=1e-6, atol=0)
    rest = got.log() - logits.double()
    rest = rest - rest[:1] - rest[:, :1] + rest[0, 0]
    assert rest.abs().max() < 1e-5
    # And it does what it is for.
    before = count_tokens_per_expert(choose_topk(logits.softmax(1), 1, normalize=False)[0], 7)
    after = count_tokens_per_expert(choose_topk(got, 1, normalize=False)[0], 7)
    assert after.max() < before.max() / 2


def test_hard_logits() -> None:
    """Logits whose exp overflows, experts out of reach, no token, no gradient."""
    logits = torch.randn(20, 5)
    want = sinkhorn(logits)
    torch.testing.assert_close(sinkhorn(logits + torch.arange(20.0).unsqueeze(1) * 100), want, rtol=1e-4, atol=1e-9)
    for far in (-300.0, -2000.0, -float("inf")):
        logits[:, 2] = far
        assert sinkhorn(logits).isfinite().all()
    assert sinkhorn(logits)[:, 2].tolist() == [0.0] * 20
    assert sinkhorn(torch.empty(0, 5)).shape == (0, 5)
    assert not sinkhorn(torch.randn(3, 4, requires_grad=True)).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sinkhorn(torch.ones(4, 2)), torch.full((4, 2), 1 / 8), rtol=1e-6, atol=0)
    with pytest.raises(ConfigError, match="max_iterations is 0: must be at least 1"):
        sinkhorn(logits, max_iterations=0)


def test_padding_takes_no_part() -> None:
    logits, valid = torch.randn(20, 6) * 2, torch.rand(20) < 0.6
    want = sinkhorn(logits[valid])
    logits[~valid] = float("nan")
    got = sinkhorn(logits, valid_T=valid)
    torch.testing.assert_close(got[valid], want, rtol=1e-6, atol=0)
    assert got[~valid].eq(0).all()
    assert sinkhorn(logits, valid_T=torch.zeros(20, dtype=torch.bool)).eq(0).all()


def test_ranks_share_a_batch(tmp_path: Path) -> None:
    run_ranks(sinkhorn_worker.rank_main, (2, str(tmp_path / "store")), 2)
