"""Scores, the choice of experts, weights and counts against numbers worked out by hand, loops in fp64, numpy."""

import math
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dmoe.ops.routing
from dmoe.errors import ConfigError
from dmoe.ops import choose_topk, count_tokens_per_expert, limit_to_groups, route, router_scores


def test_scores() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [-50.0, 50.0]])
    torch.testing.assert_close(router_scores(logits, "softmax")[0], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(router_scores(logits, "sigmoid")[0], torch.tensor([0.5, 0.75]))
    assert router_scores(logits, "sigmoid")[1].tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    with pytest.raises(ValueError, match="softplus"):
        router_scores(logits, "softplus")


def test_choose_topk_normalises_and_scales() -> None:
    # Scores 0.5, 0.3, 0.2, K = 2: picks 0 and 1; normalised 5/8 and 3/8; scaled by 4: 2.5 and 1.5.
    scores = torch.tensor([[0.3, 0.2, 0.5]])
    ids, weights = choose_topk(scores, 2, normalize=False)
    assert ids.tolist() == [[2, 0]]
    assert ids.dtype == torch.int64
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.3]]))
    torch.testing.assert_close(choose_topk(scores, 2, normalize=True)[1], torch.tensor([[0.625, 0.375]]))
    scaled = choose_topk(scores, 2, normalize=True, scaling_factor=4.0)[1]
    torch.testing.assert_close(scaled, torch.tensor([[2.5, 1.5]]))
    scaled = choose_topk(scores, 2, normalize=False, scaling_factor=4.0)[1]
    torch.testing.assert_close(scaled, torch.tensor([[2.0, 1.2]]))


def test_choose_topk_of_scores_that_underflowed() -> None:
    scores = torch.zeros(2, 4, requires_grad=True)
    weights = choose_topk(scores, 2, normalize=True)[1]
    assert weights.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    weights.sum().backward()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(50, 3, 7), (0, 2, 4), (1, 1, 1), (9, 4, 4)])
def test_counts_against_numpy(tokens: int, top_k: int, experts: int, ids_dtype: torch.dtype) -> None:
    ids = torch.rand(tokens, experts).topk(top_k).indices.to(ids_dtype)
    counts = count_tokens_per_expert(ids, experts)
    assert counts.dtype == torch.int64
    np.testing.assert_array_equal(counts.numpy(), np.bincount(ids.numpy().ravel(), minlength=experts))


def test_counts_leave_out_the_id_of_no_expert() -> None:
    ids = torch.tensor([[3, 3, 0], [2, 3, 1], [3, 3, 3], [0, 2, 3]])
    assert count_tokens_per_expert(ids, 3).tolist() == [2, 1, 2]
    assert count_tokens_per_expert(torch.ones(4, 2, dtype=torch.int64), 1).tolist() == [0]


def test_sqrtsoftplus() -> None:
    """Against math in double, from where exp(l) underflows to where it overflows; and the gradient."""
    values = [-300.0, -90.0, -40.1, -39.9, -5.0, 0.0, 3.0, 19.0, 21.0, 39.0, 41.0, 500.0]
    for dtype, rtol in ((torch.float64, 1e-13), (torch.float32, 1e-6)):
        logits = torch.tensor([values], dtype=dtype, requires_grad=True)
        scores = router_scores(logits, "sqrtsoftplus")
        scores.sum().backward()
        for i, value in enumerate(values):
            softplus = max(value, 0.0) + math.log1p(math.exp(-abs(value)))
            sigmoid = math.exp(min(value, 0.0)) / (1 + math.exp(-abs(value)))
            tiny = 1e-38 if dtype == torch.float32 else 0.0  # below it fp32 is coarse or 0
            assert scores[0, i].item() == pytest.approx(softplus**0.5, rel=rtol, abs=tiny)
            assert logits.grad[0, i].item() == pytest.approx(sigmoid / (2 * softplus**0.5), rel=rtol, abs=tiny)


def oracle(
    logits: Tensor, K: int, *, score_function: str = "softmax", normalize: bool = False, scaling_factor: float = 1.0,
    softmax_after_topk: bool = False, bias_E: Tensor | None = None, n_group: int = 1, topk_group: int = 1,
    group_score_top: int = 0,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """The rules token by token, in Python's arithmetic."""
    E = logits.shape[1]
    bias = [0.0] * E if bias_E is None else bias_E.tolist()
    size, all_ids, all_weights = E // n_group, [], []
    for row in logits.tolist():
        if score_function == "softmax":
            scores = [math.exp(v) / sum(math.exp(u) for u in row) for v in row]
        elif score_function == "sigmoid":
            scores = [1 / (1 + math.exp(-v)) for v in row]
        else:
            scores = [math.sqrt(math.log(1 + math.exp(v))) for v in row]
        chosen_by = [v + b for v, b in zip(row if softmax_after_topk else scores, bias)]
        top = group_score_top or max(1, K // topk_group)
        groups = [chosen_by[g * size : (g + 1) * size] for g in range(n_group)]
        by_group = [sum(sorted(group, reverse=True)[:top]) for group in groups]
        best = sorted(range(n_group), key=lambda g: -by_group[g])[:topk_group]
        ids = sorted((e for e in range(E) if e // size in best), key=lambda e: -chosen_by[e])[:K]
        weights = [math.exp(row[e]) if softmax_after_topk else scores[e] for e in ids]
        total = sum(weights) if normalize or softmax_after_topk else 1.0
        all_ids.append(ids)
        all_weights.append([scaling_factor * w / total for w in weights])
    return all_ids, all_weights


GROUPS = {"n_group": 4, "topk_group": 2}
CASES: list[tuple[int, int, int, dict[str, Any]]] = [
    (40, 8, 2, {"score_function": "sqrtsoftplus", "normalize": True, "bias": True, "scaling_factor": 1.5}),
    (40, 7, 3, {"score_function": "sigmoid", "normalize": True, "bias": True, "scaling_factor": 2.5}),
    (40, 7, 7, {"score_function": "sigmoid", "bias": True}),
    (40, 7, 3, {"bias": True}),
    (40, 12, 4, {"score_function": "sigmoid", "normalize": True, "bias": True, **GROUPS}),
    (40, 12, 4, {"score_function": "sigmoid", "bias": True, "group_score_top": 1, **GROUPS}),
    (40, 12, 6, {"score_function": "sqrtsoftplus", "group_score_top": 2, **GROUPS}),
    (40, 12, 1, {"n_group": 4, "topk_group": 3}),  # K / topk_group is less than 1
    (40, 12, 5, {"n_group": 4, "topk_group": 4}),  # no limit
    (40, 10, 3, {"normalize": True, "n_group": 10, "topk_group": 4}),  # groups of one
    (40, 12, 4, {"n_group": 1, "topk_group": 1, "group_score_top": 9}),
    (40, 7, 3, {"softmax_after_topk": True}),
    (40, 7, 3, {"softmax_after_topk": True, "bias": True, "scaling_factor": 2.0}),
    (40, 12, 4, {"softmax_after_topk": True, "bias": True, "group_score_top": 2, **GROUPS}),
    (40, 5, 1, {"softmax_after_topk": True}),
    (1, 6, 2, {"score_function": "sigmoid", "bias": True, "n_group": 3, "topk_group": 1, "group_score_top": 2}),
    (3, 1, 1, {"score_function": "sigmoid", "normalize": True, "bias": True}),
    (0, 6, 2, {"score_function": "sigmoid", "bias": True, "n_group": 3, "topk_group": 2}),
    (0, 6, 2, {"softmax_after_topk": True}),
]


@pytest.mark.parametrize(("T", "E", "K", "options"), CASES)
def test_route_against_loops(T: int, E: int, K: int, options: dict[str, Any]) -> None:
    options = {"score_function": "softmax", "normalize": False, **options}
    bias = torch.randn(E, dtype=torch.float64) / 2 if options.pop("bias", False) else None
    logits = torch.randn(T, E, dtype=torch.float64).requires_grad_()
    if bias is not None:
        bias.requires_grad_()
    scores, ids, weights = route(logits, K, bias_E=bias, **options)
    want_ids, want_weights = oracle(logits.detach(), K, bias_E=bias, **options)
    assert (ids.shape, ids.dtype, weights.dtype) == ((T, K), torch.int64, torch.float64)
    assert ids.tolist() == want_ids
    np.testing.assert_allclose(weights.detach().numpy().reshape(T, K), np.array(want_weights).reshape(T, K), rtol=1e-12)
    assert torch.equal(scores, router_scores(logits, options["score_function"]))
    if T:
        inputs = [logits] if bias is None else [logits, bias]
        grads = torch.autograd.grad(weights.square().sum(), inputs, allow_unused=True)
        assert bias is None or grads[1] is None  # the bias of the choice is not learned
        few = logits[:2].detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: route(x, K, bias_E=bias, **options)[::2], few)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias_E": torch.ones(6)},
        {"n_group": 3, "topk_group": 2},
        {"softmax_after_topk": True},
        {"score_function": "sqrtsoftplus"},
    ],
)
def test_kernel_is_left_to_what_it_computes(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is replaced, so that calling it shows."""
    options, logits = {"score_function": "softmax", "normalize": True, **changes}, torch.randn(5, 6)
    want = route(logits, 2, **options)
    kernel = types.ModuleType("dmoe.ops.kernels.topk")
    kernel.route_triton = lambda *args, **kwargs: "the kernel"
    monkeypatch.setitem(sys.modules, "dmoe.ops.kernels.topk", kernel)
    monkeypatch.setattr(dmoe.ops.routing, "fused_routing", lambda _: True)
    for got_part, want_part in zip(route(logits, 2, **options), want, strict=True):
        assert torch.equal(got_part, want_part)
    assert route(logits, 2, score_function="softmax", normalize=True) == "the kernel"


def test_equal_scores() -> None:
    """Whichever is chosen: ids are distinct and the weights those of the K highest."""
    scores = torch.randint(0, 3, (200, 12)).float()
    for options in ({}, {"bias_E": torch.zeros(12)}, {"n_group": 12, "topk_group": 5}):
        ids, weights = choose_topk(scores, 5, normalize=False, **options)
        assert all(len(set(row)) == 5 for row in ids.tolist())
        assert torch.equal(weights, scores.sort(descending=True).values[:, :5])
    ids = choose_topk(torch.zeros(50, 12), 4, normalize=False, n_group=4, topk_group=2)[0]
    assert all(len({e // 3 for e in row}) == 2 for row in ids.tolist())
    assert all(len(set(row)) == 4 for row in ids.tolist())


def test_limit_to_groups() -> None:
    # Groups (1, 9), (5, 6), (7, 0): sums 10, 11, 7; maxima 9, 6, 7.
    scores = torch.tensor([[1.0, 9.0, 5.0, 6.0, 7.0, 0.0]])
    no = float("-inf")
    assert limit_to_groups(scores, 3, 1, 2).tolist() == [[no, no, 5.0, 6.0, no, no]]
    assert limit_to_groups(scores, 3, 1, 1).tolist() == [[1.0, 9.0, no, no, no, no]]
    assert limit_to_groups(scores, 3, 2, 2).tolist() == [[1.0, 9.0, 5.0, 6.0, no, no]]
    assert limit_to_groups(scores, 3, 2, 1).tolist() == [[1.0, 9.0, no, no, 7.0, 0.0]]
    assert limit_to_groups(scores, 6, 2, 1).tolist() == [[no, 9.0, no, no, 7.0, no]]
    assert torch.equal(limit_to_groups(scores, 3, 3, 2), scores)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, "top_k is 0: must be from 1 to the 12 experts"),
        ({"top_k": 13}, "top_k is 13: must be from 1 to the 12 experts"),
        ({"n_group": 5}, "n_group is 5: must be a divisor of the 12 experts"),
        ({"n_group": 0}, "n_group is 0"),
        ({"n_group": 4, "topk_group": 5}, r"topk_group is 5: must be from 1 to n_group \(4\)"),
        ({"n_group": 4, "topk_group": 0}, "topk_group is 0"),
        ({"n_group": 4, "group_score_top": 4}, "group_score_top is 4: must be from 1 to the 3 experts of a group"),
        ({"n_group": 4, "group_score_top": -1}, "group_score_top is -1"),
        ({"n_group": 4, "top_k": 4, "group_score_top": 1}, r"top_k is 4: must be at most 3, the experts of topk_group"),
        ({"score_function": "relu"}, "score_function is 'relu': must be one of softmax, sigmoid, sqrtsoftplus"),
        ({"score_function": "sigmoid", "softmax_after_topk": True}, "score_function is 'sigmoid': must be \"softmax\""),
    ],
)
def test_bad_numbers(changes: dict[str, Any], message: str) -> None:
    options = {"top_k": 2, "score_function": "softmax", "normalize": False, **changes}
    with pytest.raises(ConfigError, match=message):
        route(torch.randn(3, 12), **options)
