"""Picks of no expert (id E) in `expert_mlp`: values and gradients, whatever lies in memory that no product wrote.

The Triton kernels: no_expert_cases.py. Between ranks: tests/distributed/dispatch_no_expert.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_oracle import DIFFERENTIABLE, Problem, make_problem, relative_error
from fp8_oracle import oracle as fp8_oracle
from no_expert import KINDS, drop, dropped_gradient, gradients_with_drops, kept
from torch import Tensor

from dmoe.ops import expert_mlp, grouped, packed, products
from dmoe.ops.packed import PackedWeights, expert_mlp_packed, why_not_packed
from dmoe.ops.permute import first_rows, gather_rows, pad_groups, sort_by_expert, sum_rows

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SHAPES: dict[str, dict[str, Any]] = {
    "gated": {"T": 23, "E": 5, "K": 3, "bias": True},
    "plain": {"T": 23, "E": 3, "K": 2, "gated": False, "bias": True},
    "top-1, without biases": {"T": 30, "E": 4, "K": 1},
    "one expert": {"T": 9, "E": 1, "K": 1, "bias": True},
    "one token": {"T": 1, "E": 4, "K": 4, "bias": True},
    "no token": {"T": 0, "bias": True},
    "unaligned": {"T": 12, "D": 7, "F": 5, "E": 6, "K": 2, "bias": True},
}
WAYS = ("reference", "torch", "torch, rows of fixed number")
"""The last is what runs on a GPU and inside the compiler, where rows of no expert stay, as rows that nothing wrote."""


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, and the largest integer
    yield
    torch.use_deterministic_algorithms(False)


def run(p: Problem, grad: Tensor, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {n: getattr(p, n).clone().requires_grad_() for n in DIFFERENTIABLE if getattr(p, n) is not None}
    y = expert_mlp(*replace(p, **leaves).tensors(), activation=p.activation, **options)
    y.backward(grad)
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_close(got: tuple[Any, Any], want: tuple[Any, Any], tolerance: float) -> None:
    assert relative_error(got[0], want[0]) <= tolerance
    assert got[1].keys() == want[1].keys()
    for name in want[1]:
        assert relative_error(got[1][name], want[1][name]) <= tolerance, name


def assert_drops(shape: dict[str, Any], kind: str, dtype: torch.dtype, **options: Any) -> None:
    dirty, clean = drop(make_problem(dtype=dtype, **shape), kind)
    grad = dropped_gradient(dirty, float("nan"))
    got = run(dirty, grad, **options)
    assert_close(got, gradients_with_drops(clean, grad.nan_to_num(0)), TOLERANCE[dtype])
    lost = dirty.topk_ids == dirty.down.shape[0]
    assert (got[1]["topk_weights"][lost] == 0).all()
    assert (got[0][lost.all(dim=1)] == 0).all()
    assert (got[1]["x"][lost.all(dim=1)] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
def test_values_and_gradients(
    dtype: torch.dtype, way: str, shape: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = way.split(",")[0]
    if way != backend:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_drops(shape, kind, dtype, backend=backend)


@pytest.mark.parametrize("limit", [0.0, 1e9], ids=["grouped", "batched"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["gated", "one expert", "no token"])
def test_padded_groups(shape: str, kind: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PADDING_LIMIT", limit)
    assert_drops(SHAPES[shape], kind, torch.bfloat16, backend="torch")


def test_padding_that_makes_up_for_what_was_dropped() -> None:
    """As many padded rows as there are picks: no number of rows says that groups are padded."""
    p = make_problem(T=16, E=2, K=1, bias=True, dtype=torch.bfloat16)
    p.topk_ids = torch.tensor([0] * 8 + [1] * 4 + [2] * 4).unsqueeze(1)
    permutation = products.permute_rows(p.topk_ids, p.gate_up, may_resize=True)
    assert permutation.order_R.numel() == 16
    assert permutation.order_R.max() == 16
    grad = torch.randn(p.x.shape).bfloat16()
    assert_close(run(p, grad, backend="torch"), gradients_with_drops(p, grad), 2e-2)


@pytest.mark.parametrize("fixed", [False, True], ids=["", "rows of fixed number"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["gated", "plain", "one expert"])
def test_fp8(shape: str, kind: str, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dirty, clean = drop(make_problem(D=32, F=48, dtype=torch.bfloat16, **SHAPES[shape]), kind)
    grad = dropped_gradient(dirty, float("nan"))
    want = fp8_oracle(clean, grad.nan_to_num(0))
    if fixed:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert_close(run(dirty, grad, precision="fp8"), want, 1e-2)


@pytest.mark.skipif(why_not_packed(torch.empty(1, 1, 1)) is not None, reason="this CPU packs nothing")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_packed(shape: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dirty, clean = drop(make_problem(**shape), kind)
    want, _ = gradients_with_drops(clean, torch.zeros_like(clean.x))
    computed, linear = [], packed._linear

    def noted(rows: Tensor, *rest: Any) -> Tensor:
        computed.append(len(rows))
        return linear(rows, *rest)

    monkeypatch.setattr(packed, "_linear", noted)
    weights = PackedWeights(dirty.gate_up), PackedWeights(dirty.down)
    ids, biases = (dirty.topk_ids, dirty.topk_weights), (dirty.gate_up_bias, dirty.down_bias)
    got = expert_mlp_packed(dirty.x, *ids, *weights, *biases, activation=dirty.activation)
    assert relative_error(got, want) <= 1e-5
    counts = torch.bincount(dirty.topk_ids.flatten(), minlength=len(dirty.down) + 1)[:-1].tolist()
    assert computed == 2 * [packed._rows_computed(n) for n in counts if n]


def test_rows_of_no_expert_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU they are not even gathered; elsewhere the products end before them."""
    given: list[tuple[int, int]] = []

    def noted(rows: Tensor, weights: Tensor, offsets: Tensor, batch: bool) -> Tensor:
        given.append((rows.shape[0], int(offsets[-1])))
        return products.rows_times_weights(rows, weights, offsets, batch)

    monkeypatch.setattr(grouped, "rows_times_weights", noted)
    dirty, _ = drop(make_problem(T=40, E=5, K=3), "some")
    N, R = kept(dirty), dirty.topk_ids.numel()
    assert 0 < N < R
    run(dirty, torch.zeros_like(dirty.x), backend="torch")
    assert given == [(N, N), (N + 1, N), (N, N), (N + 1, N)]  # one row more in the sums over picks
    given.clear()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    run(dirty, torch.zeros_like(dirty.x), backend="torch")
    assert given == [(R, N), (R + 1, N), (R, N), (R + 1, N)]


def test_compiled_equals_eager() -> None:
    def call(*tensors: Tensor) -> Tensor:
        return expert_mlp(*tensors, backend="torch")

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for kind in ("some", "all"):
        dirty, _ = drop(make_problem(T=20, bias=True), kind)
        results = []
        for function in (call, compiled):
            leaves = {n: getattr(dirty, n).clone().requires_grad_() for n in DIFFERENTIABLE}
            y = function(*replace(dirty, **leaves).tensors())
            y.sum().backward()
            results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_second_derivative_of_the_reference() -> None:
    dirty, _ = drop(make_problem(T=6, D=3, E=3, F=2, bias=True, dtype=torch.float64), "some")
    weights = dirty.topk_weights.double()
    used = (dirty.topk_ids < 3).any(dim=1)
    x = dirty.x[used].requires_grad_()
    rest = (dirty.topk_ids[used], weights[used], dirty.gate_up, dirty.down)
    assert torch.autograd.gradgradcheck(lambda t: expert_mlp(t, *rest), x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("kind", KINDS)
def test_sort_by_expert(kind: str, dtype: torch.dtype) -> None:
    dirty, _ = drop(make_problem(T=20, E=4, K=3), kind)
    ids, N = dirty.topk_ids.to(dtype), kept(dirty)
    order, inverse, offsets = sort_by_expert(ids, 4)
    assert torch.equal(order, torch.sort(ids.flatten(), stable=True).indices)
    assert offsets.tolist() == [int((ids <= e).sum()) for e in range(4)]
    lost = ids == 4
    assert (inverse[lost] == 60).all()
    assert torch.equal(order[inverse[~lost]], torch.arange(60).view(20, 3)[~lost])
    order, inverse, _ = first_rows(sort_by_expert(ids, 4), N)
    assert order.numel() == N
    assert (inverse[lost] == N).all()
    sizes = torch.diff(offsets, prepend=torch.zeros(1, dtype=torch.int32)) + torch.tensor([3, 0, 1, 2])
    padded, slots, _ = pad_groups(first_rows(sort_by_expert(ids, 4), N), sizes)
    assert (slots[lost] == N + 6).all()
    assert torch.equal(padded[slots[~lost]], torch.arange(60).view(20, 3)[~lost])
    assert (padded == 60).sum() == 6


@pytest.mark.parametrize("compiling", [False, True], ids=["", "compiling"])
@pytest.mark.parametrize("kind", KINDS)
def test_gather_rows_and_sum_rows(kind: str, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of k, and no row of zeros: values and gradients against sums written out."""
    dirty, _ = drop(make_problem(T=20, E=4, K=3), kind)
    N, ids = kept(dirty), dirty.topk_ids
    permutation = first_rows(sort_by_expert(ids, 4), N)
    x, y = dirty.x.clone().requires_grad_(), torch.randn(N, 16, requires_grad=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    rows, total = gather_rows(x, permutation), sum_rows(y, permutation)
    assert torch.equal(rows, x[permutation.order_R // 3])

    def summed(rows: Tensor) -> Tensor:
        want = torch.zeros(20, 16)
        for t, k in torch.cartesian_prod(torch.arange(20), torch.arange(3)).tolist():
            if ids[t, k] < 4:
                want[t] += rows[permutation.inverse_TK[t, k]]
        return want

    assert torch.equal(total, summed(y.detach()))
    grad_rows, grad = torch.randn(N, 16), torch.randn(20, 16)
    rows.backward(grad_rows)
    assert torch.equal(x.grad, summed(grad_rows))
    total.backward(grad)
    assert torch.equal(y.grad, grad[permutation.order_R // 3])
