"""Scores, top k and weights in one Triton kernel, against fp64 arithmetic and autograd.

Run by `test_routing_kernels.py` in the interpreter and by `tests/gpu/test_routing_kernels_gpu.py` on a GPU.
"""

from typing import Any

import pytest
import torch
from interpreted import DEVICE
from torch import Tensor

import dmoe.ops.routing
from dmoe import MoE, MoEConfig
from dmoe.ops import choose_topk, router_scores
from dmoe.ops.kernels.topk import route_triton

SHAPES = [
    (10, 7, 2),
    (33, 128, 8),
    (3, 1000, 4),
    (2, 40, 40),
    (5, 16, 1),
    (0, 4, 2),
    (1, 1, 1),
    (2, 1024, 3),
    (70, 8, 2),
]
OPTIONS = {
    "softmax": {"score_function": "softmax", "normalize": False},
    "softmax normalised": {"score_function": "softmax", "normalize": True},
    "sigmoid": {"score_function": "sigmoid", "normalize": False},
    "sigmoid normalised and scaled": {"score_function": "sigmoid", "normalize": True, "scaling_factor": 2.5},
}


def reference(logits: Tensor, K: int, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    choice = {name: value for name, value in options.items() if name != "score_function"}
    scores = router_scores(logits, options["score_function"])
    return scores, *choose_topk(scores, K, **choice)


def make_logits(T: int, E: int) -> Tensor:
    """Distinct in each row by more than rounding, so that the order is beyond doubt; exact in fp32."""
    ranks = torch.rand(T, E).argsort(1) - E // 2
    return (ranks * (8.0 / E) + torch.rand(T, E) / E).to(DEVICE).float()


def check_choice(scores: Tensor, ids: Tensor, K: int) -> None:
    """The K highest by falling score, and the lower id where scores are equal."""
    want = scores.sort(dim=1, descending=True, stable=True).indices[:, :K]
    assert torch.equal(ids, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_forward(T: int, E: int, K: int, options: dict[str, Any]) -> None:
    logits = make_logits(T, E)
    torch.full((2**20,), float("nan"), device=DEVICE)  # freed at once: memory that is not written shows
    scores, ids, weights = route_triton(logits, K, **options)
    want_scores, want_ids, want_weights = reference(logits.double(), K, options)
    assert torch.equal(ids, want_ids)
    assert (scores.dtype, ids.dtype, weights.dtype) == (torch.float32, torch.int64, torch.float32)
    torch.testing.assert_close(scores.double(), want_scores, rtol=2e-6, atol=1e-10)
    torch.testing.assert_close(weights.double(), want_weights, rtol=2e-6, atol=1e-10)
    check_choice(scores, ids, K)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_backward(T: int, E: int, K: int, options: dict[str, Any]) -> None:
    logits = make_logits(T, E)
    grads = torch.randn(T, E, device=DEVICE), torch.randn(K, T, device=DEVICE).t()
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    outputs, want_outputs = route_triton(leaf, K, **options)[::2], reference(wide, K, options)[::2]
    # Both gradients; and that of the scores, or of the weights, alone.
    for used in [slice(0, 2), slice(0, 1), slice(1, 2)][: 3 if E == 7 else 1]:
        torch.full((2**20,), float("nan"), device=DEVICE)
        (got,) = torch.autograd.grad(outputs[used], leaf, grads[used], retain_graph=True)
        wide_grads = [g.double() for g in grads[used]]
        (want,) = torch.autograd.grad(want_outputs[used], wide, wide_grads, retain_graph=True)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


def test_backward_of_an_expanded_gradient() -> None:
    logits = make_logits(9, 12).requires_grad_()
    row = torch.randn(12, device=DEVICE)
    (got,) = torch.autograd.grad((route_triton(logits, 3, **OPTIONS["sigmoid"])[0].sum(0) * row).sum(), logits)
    s = logits.detach().double().sigmoid()
    torch.testing.assert_close(got.double(), row * s * (1 - s), rtol=1e-5, atol=1e-7)


def test_equal_scores_go_to_the_lower_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0], [0.0] * 5, [50.0, 60.0, 70.0, -1.0, 0.0]], device=DEVICE)
    ids = route_triton(logits, 4, **OPTIONS["softmax"])[1]
    assert ids[:2].tolist() == [[1, 3, 0, 2], [0, 1, 2, 3]]
    # Sigmoids of 50, 60 and 70 are all 1 in fp32.
    assert route_triton(logits, 4, **OPTIONS["sigmoid"])[1][2].tolist() == [0, 1, 2, 4]


def test_scores_that_underflow() -> None:
    logits = torch.full((2, 6), -1000.0, device=DEVICE)
    logits[1, 2] = -40.0  # a sigmoid of 4e-18: above the bound of the sum
    logits.requires_grad_()
    scores, ids, weights = route_triton(logits, 2, **OPTIONS["sigmoid normalised and scaled"])
    assert ids.tolist() == [[0, 1], [2, 0]]
    torch.testing.assert_close(weights.tolist(), [[0.0, 0.0], [2.5, 0.0]], rtol=2e-7, atol=0)
    (grad,) = torch.autograd.grad(weights.sum() + scores.sum(), logits)
    assert grad.isfinite().all()
    scores, ids, _ = route_triton(logits - 1e4 * torch.arange(6, device=DEVICE), 3, **OPTIONS["softmax normalised"])
    assert scores.tolist()[0] == [1.0, 0, 0, 0, 0, 0]
    assert ids.tolist() == [[0, 1, 2]] * 2


def test_a_sum_below_the_bound() -> None:
    """Sigmoids of about 1e-22: weights are s_k / 1e-20, and their gradient is that of s_k / 1e-20."""
    logits = (make_logits(4, 6) / 10 - 50.0).requires_grad_()
    wide = logits.detach().double().requires_grad_()
    options = OPTIONS["sigmoid normalised and scaled"]
    results = [route_triton(logits, 3, **options)[2], reference(wide, 3, options)[2]]
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-4, atol=0)
    got, want = (torch.autograd.grad(w[:, 0].sum(), x)[0] for w, x in zip(results, (logits, wide)))
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("K", [7, 11])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ids_are_valid_and_distinct_whatever_the_logits(options: dict[str, Any], K: int) -> None:
    logits = torch.randn(5, 11)
    logits[0, 3] = float("nan")
    logits[1] = float("nan")
    logits[2, 4:] = float("-inf")
    logits[3, 5] = float("inf")
    logits[4] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # NaN with its sign bit set
    scores, ids, weights = route_triton(logits.to(DEVICE), K, **options)
    for row in ids.tolist():
        assert len(set(row)) == K
        assert set(row) <= set(range(11))
    assert scores[0, 3].isnan()
    assert weights[0].isnan().any()  # a NaN is not hidden
    assert ids[2, :4].sort().values.tolist() == [0, 1, 2, 3]


def test_second_derivative() -> None:
    logits = make_logits(5, 6)
    weights, other = torch.randn(5, 3, device=DEVICE), torch.randn(5, 6, device=DEVICE)
    for options in OPTIONS.values():
        results = []
        for x, route in ((logits.clone(), route_triton), (logits.double(), None)):
            x.requires_grad_()
            s, _, w = route(x, 3, **options) if route else reference(x, 3, options)
            (first,) = torch.autograd.grad((w * weights).sum() + (s.square() * other).sum(), x, create_graph=True)
            results += torch.autograd.grad((first * other).sum(), x)
        torch.testing.assert_close(results[0].double(), results[1], rtol=1e-4, atol=1e-5)


def test_functional_gradient_and_no_gradient() -> None:
    logits = make_logits(5, 6)

    def total(x: Tensor, route: Any = route_triton) -> Tensor:
        return route(x, 2, **OPTIONS["softmax normalised"])[2].square().sum()

    leaf = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(logits), want)
    with torch.no_grad():
        assert all(t.grad_fn is None for t in route_triton(leaf, 2, **OPTIONS["softmax"]))
    scores, ids, weights = route_triton(leaf, 2, **OPTIONS["softmax"])
    assert (scores.requires_grad, ids.requires_grad, weights.requires_grad) == (True, False, True)


def test_route_is_an_operator() -> None:
    for T in (0, 5):
        logits = make_logits(T, 6)
        torch.library.opcheck(torch.ops.dmoe.route.default, (logits, 2, "softmax", True, 2.0))
        scores, ids, weights = route_triton(logits, 2, **OPTIONS["softmax"])
        for grads in ((scores, weights), (None, weights), (scores, None)):
            args = (*grads, scores, ids, "softmax", True, 2.0)
            torch.library.opcheck(torch.ops.dmoe.route_backward.default, args)


def test_errors_of_route() -> None:
    logits = make_logits(5, 6)
    with pytest.raises(ValueError, match="float64"):
        route_triton(logits.double(), 2, **OPTIONS["softmax"])
    with pytest.raises(ValueError, match="got 7"):
        route_triton(logits, 7, **OPTIONS["softmax"])
    with pytest.raises(ValueError, match="softplus"):
        route_triton(logits, 2, score_function="softplus", normalize=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_layer(score_function: str, coefficient: float, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that routes with the kernel: output and gradients of one that does not, in one graph too."""
    config = MoEConfig(
        hidden_size=16, intermediate_size=8, num_experts=6, top_k=2, score_function=score_function,
        norm_topk_prob=True, routed_scaling_factor=1.5, aux_loss_coef=coefficient, z_loss_coef=coefficient,
    )  # fmt: skip
    layer = MoE(config).to(DEVICE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(12, 16, device=DEVICE)
    results = []
    for fused in (False, True):
        monkeypatch.setattr(dmoe.ops.routing, "fused_routing", lambda _, fused=fused: fused)
        torch.compiler.reset()
        call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled and fused else layer
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().mean().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    for want, got in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
