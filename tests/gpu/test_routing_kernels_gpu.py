"""The Triton kernels around the experts on a GPU: the cases of the interpreter, large sizes, graphs, the same bits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
pytest.register_assert_rewrite("rows_kernel_cases", "topk_kernel_cases", "token_rows_cases")

from rows_kernel_cases import *  # noqa: E402, F403
from rows_kernel_cases import check_permutation, poison, some_ids  # noqa: E402
from token_rows_cases import *  # noqa: E402, F403
from token_rows_cases import check_rows  # noqa: E402
from topk_kernel_cases import *  # noqa: E402, F403
from topk_kernel_cases import OPTIONS, check_choice, reference  # noqa: E402

from dmoe.ops.kernels.rows import spread_rows, sum_picks_triton  # noqa: E402
from dmoe.ops.kernels.sorting import counting_sort  # noqa: E402
from dmoe.ops.kernels.topk import route_triton  # noqa: E402

LARGE = [(32768, 8, 128), (4096, 2, 8), (16384, 8, 1000), (300, 4, 60), (128, 8, 128), (70000, 1, 1)]


@pytest.mark.parametrize("kind", ["uniform", "skewed", "last"])
@pytest.mark.parametrize(("T", "K", "E"), LARGE)
def test_sort_large(T: int, K: int, E: int, kind: str) -> None:
    ids = some_ids(T, K, E, kind).cuda()
    poison()
    first = counting_sort(ids, E)
    check_permutation(ids, E, first)
    for _ in range(5):
        poison()
        again = counting_sort(ids, E)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("kind", ["uniform", "skewed"])
@pytest.mark.parametrize(("T", "K", "W", "e"), [(16384, 8, 4, 16), (30011, 2, 8, 1), (5000, 6, 16, 10)])
def test_rows_by_rank_large(T: int, K: int, W: int, e: int, kind: str) -> None:
    check_rows(some_ids(T, K, W * e, kind).cuda(), torch.rand(T, K, device="cuda"), W, e)


@pytest.mark.parametrize(("T", "K", "D"), [(8192, 8, 2048), (1000, 6, 2880), (777, 8, 7168)])
def test_rows_large(T: int, K: int, D: int) -> None:
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    inverse = torch.randperm(T * K, device="cuda").view(T, K).int()
    rows = torch.randn(T * K, D, device="cuda", dtype=torch.bfloat16)
    want = torch.zeros(T, D, device="cuda")
    for k in range(K):
        want += rows[inverse[:, k].long()].float()
    for _ in range(3):
        poison()
        assert torch.equal(sum_picks_triton(rows, inverse), want.bfloat16())
    spread = spread_rows(x, inverse)
    assert torch.equal(spread[inverse.flatten().long()], x.repeat_interleave(K, 0))


def test_more_elements_than_an_int32_counts() -> None:
    T, K, D = 2**17 + 5, 8, 2048
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of GPU memory")
    x = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    inverse = torch.arange(T * K, device="cuda", dtype=torch.int32).flip(0).view(T, K)  # the last row first
    rows = spread_rows(x, inverse)
    for t in (0, 1, T // 2, T - 1):
        assert torch.equal(rows[inverse[t].long()], x[t].expand(K, D))
    # Eight times the same number: exact in bf16.
    assert torch.equal(sum_picks_triton(rows, inverse), x * K)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("T", "E", "K"), [(32768, 128, 8), (8192, 8, 2), (4097, 256, 8), (100, 1024, 100)])
def test_route_large(T: int, E: int, K: int, options: dict[str, object]) -> None:
    logits = torch.randn(T, E, device="cuda") * 3
    grads = torch.randn(T, E, device="cuda"), torch.randn(T, K, device="cuda")
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    scores, ids, weights = route_triton(leaf, K, **options)  # type: ignore[arg-type]
    (grad,) = torch.autograd.grad((scores, weights), leaf, grads, retain_graph=True)
    want_scores, want_ids, want_weights = reference(wide, K, options)  # type: ignore[arg-type]
    check_choice(scores, ids, K)
    torch.testing.assert_close(scores.double(), want_scores, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weights.double(), want_weights, rtol=1e-5, atol=2e-6)
    same = (ids == want_ids).all(1)
    ranked = want_scores.topk(K + 1).values
    tied = (ranked[:, :-1] - ranked[:, 1:] <= 1e-6 * ranked[:, :-1]).any(1)  # equal but for rounding: either is right
    assert same[~tied].all()
    assert tied.float().mean() < 0.6
    (want,) = torch.autograd.grad((want_scores, want_weights), wide, tuple(g.double() for g in grads))
    torch.testing.assert_close(grad.double()[same], want[same], rtol=1e-4, atol=1e-5)
    for _ in range(3):
        poison()
        again = route_triton(leaf, K, **options)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip((scores, ids, weights), again))
        assert torch.equal(torch.autograd.grad((scores, weights), leaf, grads, retain_graph=True)[0], grad)


def test_scores_of_a_token_do_not_depend_on_the_batch() -> None:
    logits = torch.randn(1000, 128, device="cuda")
    whole = route_triton(logits, 8, **OPTIONS["softmax normalised"])  # type: ignore[arg-type]
    for n in (1, 3, 64, 999):
        part = route_triton(logits[:n], 8, **OPTIONS["softmax normalised"])  # type: ignore[arg-type]
        assert all(torch.equal(a[:n], b) for a, b in zip(whole, part))


def replayed(function: Callable[[Tensor], list[Tensor]], first: Tensor, second: Tensor) -> list[Tensor]:
    """What a graph captured on `first` gives for `second`."""
    static = first.clone()
    function(static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(static)
    static.copy_(second)
    graph.replay()
    torch.cuda.synchronize()
    return outputs


@pytest.mark.parametrize("T", [0, 1, 16, 3000])
def test_cuda_graph(T: int) -> None:
    """Capture refuses any synchronisation with the host."""
    x = torch.randn(T, 256, device="cuda", dtype=torch.bfloat16)

    def layer(logits: Tensor) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        scores, ids, weights = route_triton(leaf, 4, score_function="softmax", normalize=True)
        permutation = counting_sort(ids, 60)
        rows = spread_rows(x, permutation.inverse_TK)
        y = sum_picks_triton(rows, permutation.inverse_TK)
        (grad,) = torch.autograd.grad((scores, weights), leaf, (scores.detach() * 2, weights.detach() * 3))
        return [scores.detach(), ids, weights.detach(), *permutation, rows, y, grad]

    first, second = torch.randn(2, T, 60, device="cuda")
    for got, want in zip(replayed(layer, first, second), layer(second), strict=True):
        assert torch.equal(got, want)
