"""Expert choice against loops; and that no rule of routing reads the device on the host."""

import pytest
import torch
from torch import Tensor

from dmoe.ops import (
    count_tokens_by_sequence,
    count_tokens_per_expert,
    expert_bias_update,
    expert_choice,
    hash_assignment,
    keep_within_capacity,
    random_assignment,
    route,
    sinkhorn,
    uniform_assignment,
)


def oracle(scores: Tensor, capacity: int, valid: list[bool]) -> tuple[list[list[int]], list[list[float]]]:
    T, E = scores.shape
    tokens, weights = [], []
    for e in range(E):
        best = sorted((t for t in range(T) if valid[t]), key=lambda t: (-scores[t, e].item(), t))[:capacity]
        missing = capacity - len(best)
        tokens.append(best + [T] * missing)
        weights.append([scores[t, e].item() for t in best] + [0.0] * missing)
    return tokens, weights


@pytest.mark.parametrize("masked", [None, 0.3, 1.0])
@pytest.mark.parametrize("equal", [False, True], ids=["", "equal scores"])
@pytest.mark.parametrize(("T", "E"), [(20, 7), (1, 3), (6, 1), (0, 4)])
def test_against_loops(T: int, E: int, equal: bool, masked: float | None) -> None:
    scores = torch.rand(T, E, dtype=torch.float64)
    if equal:
        scores = (scores * 3).round() / 3
    scores.requires_grad_()
    valid = None if masked is None else torch.rand(T) >= masked
    for capacity in (0, 1, 5, T, T + 3):
        tokens, weights = expert_choice(scores, capacity, valid)
        want_tokens, want_weights = oracle(scores, capacity, [True] * T if valid is None else valid.tolist())
        assert (tokens.shape, tokens.dtype, weights.dtype) == ((E, capacity), torch.int64, torch.float64)
        assert tokens.tolist() == want_tokens
        assert weights.tolist() == want_weights
        (grad,) = torch.autograd.grad(weights.sum(), scores)
        want = torch.zeros(T + 1, E, dtype=torch.float64)
        for e, row in enumerate(want_tokens):
            want[row, e] = 1.0
        assert torch.equal(grad, want[:T])


def test_nothing_is_read_on_the_host() -> None:
    """Tensors on the meta device have no values: what reads one, or has a shape that depends on one, raises."""
    logits, bias = torch.empty(12, 6, device="meta"), torch.empty(6, device="meta")
    for options in (
        {"score_function": "sqrtsoftplus", "normalize": True, "bias_E": bias, "n_group": 3, "topk_group": 2},
        {"score_function": "softmax", "normalize": False, "softmax_after_topk": True, "bias_E": bias},
    ):
        scores, ids, weights = route(logits, 2, **options)
    for policy in ("position", "probs"):
        kept, _, dropped = keep_within_capacity(ids, weights, 6, 3, policy)
    expert_choice(scores, 4, torch.empty(12, dtype=torch.bool, device="meta"))
    counts = count_tokens_per_expert(kept, 6)
    count_tokens_by_sequence(kept, 6, 3)
    expert_bias_update(bias, counts, 0.1)
    tokens = torch.empty(12, dtype=torch.int64, device="meta")
    for assigned in (
        hash_assignment(tokens, 6, 2),
        random_assignment(12, 6, 2, "meta"),
        uniform_assignment(12, 6, 2, "meta"),
    ):
        assert (assigned.device.type, assigned.shape) == ("meta", (12, 2))
    with pytest.raises(RuntimeError):  # the check works: this is the one that reads
        sinkhorn(logits)
    assert dropped.device.type == "meta"
