"""Capacity of experts against loops over picks."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from dmoe.errors import ConfigError
from dmoe.ops import capacity, expert_choice, keep_within_capacity
from dmoe.ops.capacity import POLICIES


def oracle(ids: Tensor, weights: Tensor, E: int, limit: int, policy: str) -> tuple[list[list[int]], Tensor, int]:
    """Each expert's picks in the order of the policy; those after the first `limit` lose their expert."""
    new_ids, new_weights, dropped = ids.tolist(), weights.detach().clone(), 0
    for e in range(E):
        picks = [(t, k) for t, row in enumerate(ids.tolist()) for k, expert in enumerate(row) if expert == e]
        if policy == "probs":
            picks.sort(key=lambda pick: -weights[pick].item())  # a stable sort: of equal weights the earlier
        for t, k in picks[limit:]:
            new_ids[t][k] = E
            new_weights[t, k] = 0.0
            dropped += 1
    return new_ids, new_weights, dropped


def picks_of(T: int, E: int, K: int, kind: str) -> tuple[Tensor, Tensor]:
    weights = torch.rand(T, K, dtype=torch.float64)
    if kind == "one expert":
        ids = torch.full((T, K), min(1, E - 1))
    else:
        ids = (torch.rand(T, E) * torch.arange(1, E + 1)).topk(K).indices  # later experts have more
    if kind == "equal weights":
        weights = torch.randint(0, 3, (T, K)).double() / 2
    if kind == "no expert":
        ids = ids.masked_fill(torch.rand(T, K) < 0.4, E)
    return ids, weights


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["skewed", "equal weights", "no expert", "one expert"])
@pytest.mark.parametrize(("T", "E", "K"), [(30, 7, 3), (9, 4, 4), (5, 1, 1), (1, 6, 2), (0, 4, 2), (300, 3, 1)])
def test_against_loops(T: int, E: int, K: int, kind: str, policy: str) -> None:
    for limit in (0, 1, 4, T, T * K + 1):
        ids, weights = picks_of(T, E, K, kind)
        weights.requires_grad_()
        want_ids, want_weights, want_dropped = oracle(ids, weights, E, limit, policy)
        for dtype in (torch.int64, torch.int32):
            got_ids, got_weights, dropped = keep_within_capacity(ids.to(dtype), weights, E, limit, policy)
            assert got_ids.tolist() == want_ids
            assert torch.equal(got_weights.detach(), want_weights)
            assert (got_ids.dtype, got_weights.dtype, dropped.dtype) == (dtype, torch.float64, torch.int64)
            assert (dropped.shape, dropped.item()) == ((), want_dropped)
        (grad,) = torch.autograd.grad(got_weights.sum(), weights)
        assert torch.equal(grad, ((got_ids != E) | (ids == E)).double())


def test_first_come_and_highest_weight() -> None:
    # Expert 0 has picks of tokens 0 to 3 with weights 0.1, 0.5, 0.5, 0.9 and room for two.
    ids = torch.tensor([[0, 1], [0, 2], [0, 2], [2, 0]])
    weights = torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.5, 0.5], [0.1, 0.9]])
    got_ids, got_weights, dropped = keep_within_capacity(ids, weights, 3, 2, "position")
    assert got_ids.tolist() == [[0, 1], [0, 2], [3, 2], [3, 3]]
    assert dropped.item() == 3
    torch.testing.assert_close(got_weights, torch.tensor([[0.1, 0.9], [0.5, 0.5], [0.0, 0.5], [0.0, 0.0]]))
    got_ids, _, dropped = keep_within_capacity(ids, weights, 3, 2, "probs")
    assert got_ids.tolist() == [[3, 1], [0, 2], [3, 2], [3, 0]]
    assert dropped.item() == 3


def test_weights_of_dropped_picks_do_not_leak() -> None:
    weights = torch.tensor([[0.5], [float("nan")], [float("inf")]], requires_grad=True)
    _, got, _ = keep_within_capacity(torch.zeros(3, 1, dtype=torch.int64), weights, 2, 1, "position")
    assert got.tolist() == [[0.5], [0.0], [0.0]]
    got.sum().backward()
    assert weights.grad.tolist() == [[1.0], [0.0], [0.0]]


def test_unknown_policy() -> None:
    with pytest.raises(ConfigError, match="policy is 'random': must be one of position, probs"):
        keep_within_capacity(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1), 2, 1, "random")


def test_capacity_is_exact() -> None:
    """Against fractions: what floating point leaves above a whole number is no token."""
    for T in (0, 1, 7, 100, 4096, 32768):
        for E, K in ((1, 1), (10, 1), (7, 3), (128, 8)):
            for factor in ("0.1", "0.5", "1", "1.1", "1.25", "1.3", "2", "1000"):
                exact = math.ceil(Fraction(T * K, E) * Fraction(factor))
                assert capacity(T, E, K, float(factor)) == min(T, max(1, exact)), (T, E, K, factor)
    assert capacity(100, 10, 1, 1.1) == 11


@pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
def test_capacity_factor_out_of_range(factor: float) -> None:
    with pytest.raises(ConfigError, match=r"capacity factor is .*: must be a finite number greater than 0"):
        capacity(10, 2, 1, factor)


def test_compiled_for_any_number_of_tokens() -> None:
    def limited(ids: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        limit = capacity(ids.shape[0], 5, 2, 1.1)
        return *keep_within_capacity(ids, weights, 5, limit, "probs"), *expert_choice(weights, limit)

    compiled = torch.compile(limited, fullgraph=True, dynamic=True, backend="eager")
    for T in (8, 33, 50):
        ids, weights = picks_of(T, 5, 2, "skewed")
        for got, want in zip(compiled(ids, weights), limited(ids, weights), strict=True):
            assert torch.equal(got, want)
