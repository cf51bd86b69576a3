"""The triton backend of `expert_mlp` on a GPU: the cases of the interpreter with the tiles of the GPU, the kernels for
other GPUs, accuracy beside the torch backend, graphs, memory, more elements than an int32 counts.

Both backends at larger sizes are in `test_expert_mlp_gpu.py`.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dense_oracle import Problem, make_problem, relative_error
from torch import Tensor

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
pytest.register_assert_rewrite(
    "expert_autograd_cases", "expert_kernel_cases", "no_expert", "no_expert_cases", "rows_kernel_cases"
)

from expert_autograd_cases import *  # noqa: E402, F403
from expert_kernel_cases import *  # noqa: E402, F403
from expert_kernel_cases import assert_agrees, forward, gradients, on_device, poison  # noqa: E402
from no_expert import KINDS, drop, dropped_gradient, kept  # noqa: E402
from no_expert_cases import *  # noqa: E402, F403

from dmoe.ops import choose_backend, expert_mlp, triton_experts  # noqa: E402
from dmoe.ops.kernels import tuned  # noqa: E402

# T, D, E, K, F: the order of `make_problem`
LAYER = (2048, 512, 16, 4, 256)


def in_fp64(p: Problem, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of the reference backend in fp64 on the GPU: the oracle computes every expert for every
    token, which is too much for large problems."""
    names = ("x", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias")
    wide = {n: getattr(p, n).double() for n in names if getattr(p, n) is not None}
    return gradients(replace(p, **wide), "reference", grad.double())


def large(dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> tuple[Problem, Tensor]:
    p = make_problem(*LAYER, bias=bias, dtype=dtype)
    return p, torch.randn(p.x.shape).to(dtype)


def test_the_backend_that_none_stands_for() -> None:
    def chosen(dtype: torch.dtype) -> str:
        return choose_backend(torch.empty(1, dtype=dtype, device="cuda"))

    assert chosen(torch.bfloat16) == chosen(torch.float16) == "triton"
    assert chosen(torch.float64) == "reference"
    assert chosen(torch.float32) == "triton"  # the fixture of the cases allows tf32
    torch.set_float32_matmul_precision("highest")
    assert chosen(torch.float32) == "torch"


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("layer", [LAYER, (4096, 1024, 64, 8, 512), (1500, 328, 7, 3, 200)], ids=str)
def test_not_less_accurate_than_grouped_products(layer: tuple[int, int, int, int, int], bias: bool) -> None:
    """In bf16, output and every gradient: the distance to fp64 is at most that of the torch backend."""
    p = make_problem(*layer, bias=bias, dtype=torch.bfloat16)
    grad = torch.randn(p.x.shape).bfloat16()
    want_y, want = in_fp64(p, grad)
    errors = {}
    for backend in ("triton", "torch"):
        y, got = gradients(p, backend, grad)
        errors[backend] = {"y": relative_error(y, want_y), **{n: relative_error(got[n], want[n]) for n in want}}
    for name, error in errors["triton"].items():
        assert error <= 1.05 * errors["torch"][name], (name, errors)


@pytest.mark.parametrize("activation", ["silu", "clamped_swiglu", "gelu"])
@pytest.mark.parametrize("T", [2000, 100], ids=["", "few rows an expert"])
def test_kernels_for_other_gpus(T: int, activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles and kernels that a GPU before or after Hopper gets; those of this GPU may be others."""
    p = make_problem(T, 192, 5, 2, 320, bias=True, dtype=torch.bfloat16, activation=activation)
    grad = torch.randn(p.x.shape).bfloat16()
    here = gradients(p, "triton", grad)
    monkeypatch.setattr(triton_experts, "is_hopper", lambda _: False)
    monkeypatch.setattr(
        triton_experts, "choose_tiles", lambda x, D, F, rows: tuned.adapt(tuned._ANY, x.element_size(), rows)
    )
    assert_agrees(p, "triton", grad)
    there = gradients(p, "triton", grad)
    assert relative_error(there[0], here[0]) <= 1e-2
    for name in here[1]:
        assert relative_error(there[1][name], here[1][name]) <= 1e-2, name


@pytest.mark.parametrize("T", [9, 257])
def test_fp32_without_tf32_is_exact(T: int) -> None:
    torch.set_float32_matmul_precision("highest")
    assert_agrees(make_problem(T, 72, 5, 2, 40, bias=True), "triton", tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_large_runs_have_the_same_bits(dtype: torch.dtype) -> None:
    p, grad = large(dtype, bias=True)
    y, first = gradients(p, "triton", grad)
    for _ in range(20):
        again, second = gradients(p, "triton", grad)
        assert torch.equal(again, y)
        assert all(torch.equal(second[name], first[name]) for name in first)


def step(p: Problem, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and all gradients of leaves made here, so that a graph holds forward and backward."""
    given = (p.gate_up, p.down, p.gate_up_bias, p.down_bias)
    parameters = [t.detach().requires_grad_() for t in given if t is not None]
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    y = expert_mlp(x, ids, weights, *parameters, backend="triton")
    return [y.detach(), *torch.autograd.grad(y, [x, weights, *parameters], grad)]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("T", [1, 300, 4096])
def test_graph_follows_new_routing(T: int, bias: bool) -> None:
    """Forward and backward captured once, replayed with other tokens and other experts: the bits of an eager step.
    Capture refuses any synchronisation with the host."""
    sizes = {"D": 256, "E": 24, "K": 3, "F": 128, "bias": bias, "dtype": torch.bfloat16}
    p, _ = on_device(make_problem(T, **sizes), ())
    grad = torch.randn_like(p.x)
    static = [p.x.clone(), p.topk_ids.clone(), p.topk_weights.clone(), grad.clone()]
    step(p, *static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(p, *static)
    for pool in (None, [0, 5, 23], None):  # uniform, all on three experts, and uniform again
        new, _ = on_device(make_problem(T, only_experts=pool, **sizes), ())
        for buffer, value in zip(static, (new.x, new.topk_ids, new.topk_weights, torch.randn_like(grad))):
            buffer.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        got = [t.clone() for t in outputs]
        poison()
        assert all(torch.equal(a, b) for a, b in zip(got, step(p, *static), strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [LAYER, (1500, 328, 7, 3, 200)], ids=str)
def test_large_layers_without_some_picks(layer: tuple[int, int, int, int, int], kind: str, backend: str) -> None:
    """In bf16, against the reference backend in fp64, in memory full of NaN; also in the kernels for Hopper."""
    dirty, clean = drop(make_problem(*layer, bias=True, dtype=torch.bfloat16), kind)
    grad = dropped_gradient(dirty, float("nan"))
    want_y, want = in_fp64(clean, grad.nan_to_num(0))
    y, got = gradients(dirty, backend, grad)
    assert relative_error(y, want_y) <= 2e-2
    for name in want:
        assert relative_error(got[name], want[name]) <= 2e-2, name


@pytest.mark.parametrize("kind", ["some", "all"])
def test_drops_leave_the_other_picks_alone(kind: str) -> None:
    """Output and gradients are those of a call in which the dropped picks never were, as tokens of their own."""
    p = make_problem(1200, 256, 8, 1, 128, bias=True, dtype=torch.bfloat16)
    dirty, _ = drop(p, kind)
    used = dirty.topk_ids[:, 0] < 8
    assert kept(dirty) == used.sum()
    grad = dropped_gradient(dirty, float("nan"))
    y, got = gradients(dirty, "triton", grad)
    part = replace(p, x=p.x[used], topk_ids=p.topk_ids[used], topk_weights=p.topk_weights[used])
    want_y, want = gradients(part, "triton", grad[used])
    for value, wanted in ((y, want_y), (got["x"], want["x"]), (got["topk_weights"], want["topk_weights"])):
        assert relative_error(value[used.to(value.device)], wanted) <= 1e-2
        assert (value[~used.to(value.device)] == 0).all()
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        assert relative_error(got[name], want[name]) <= 1e-2, name


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_graph_follows_drops(bias: bool) -> None:
    """One graph for any number of dropped picks: captured without any, replayed with some, with all, with none."""
    sizes = {"T": 300, "D": 256, "E": 24, "K": 3, "F": 128, "bias": bias, "dtype": torch.bfloat16}
    p, _ = on_device(make_problem(**sizes), ())
    grad = torch.randn_like(p.x)
    static = [p.x.clone(), p.topk_ids.clone(), p.topk_weights.clone(), grad.clone()]
    step(p, *static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(p, *static)
    for kind in ("some", "all", "one expert", "none"):
        dirty, _ = drop(make_problem(**sizes), kind)
        new = (dirty.x, dirty.topk_ids, dirty.topk_weights, dropped_gradient(dirty, float("nan")))
        for buffer, value in zip(static, new):
            buffer.copy_(value)
        graph.replay()
        torch.cuda.synchronize()
        got = [t.clone() for t in outputs]
        assert all(t.isfinite().all() for t in got)
        poison()
        assert all(torch.equal(a, b) for a, b in zip(got, step(p, *static), strict=True))


@pytest.mark.parametrize("precision", ["same", "fp8"])
def test_drops_do_not_synchronise_with_the_host(precision: str) -> None:
    dirty, _ = drop(make_problem(*LAYER, bias=True, dtype=torch.bfloat16), "some")
    q, leaves = on_device(dirty)
    grad = dropped_gradient(dirty, float("nan")).cuda()

    def run() -> None:
        y = expert_mlp(*q.tensors(), precision=precision)
        assert all(g is not None for g in torch.autograd.grad(y, list(leaves.values()), grad))

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_is_released() -> None:
    """Between forward and backward there is the output and what is kept; afterwards there is nothing."""
    p, grad = large()
    q, leaves = on_device(p)
    grad = grad.cuda()

    def backward(y: Tensor) -> None:
        torch.autograd.grad(y, list(leaves.values()), grad)

    def allocated() -> int:
        return torch.cuda.memory_stats()["requested_bytes.all.current"]

    backward(forward(q, "triton"))  # whatever is allocated once
    gc.collect()
    torch.cuda.synchronize()
    before = allocated()
    y = forward(q, "triton")
    T, D, E, K, F = LAYER
    assert allocated() - before <= T * D * 2 + T * K * (2 * F * 2 + 8) + 4 * E
    backward(y)
    del y
    assert allocated() == before


def test_more_elements_than_an_int32_counts() -> None:
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    T, D, F, E, K = 2**17 + 37, 256, 1088, 9, 8
    assert T * K * 2 * F > 2**31
    g = torch.Generator("cuda").manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(size, device="cuda", generator=g) * std).bfloat16()

    weights, ids = torch.rand(T, E, device="cuda", generator=g).topk(K)
    p = Problem(normal(T, D), ids, weights, normal(E, 2 * F, D, std=D**-0.5), normal(E, D, F, std=F**-0.5))
    grad = normal(T, D)
    y, got = gradients(p, "triton", grad)
    for tokens in (slice(0, 100), slice(T // 2, T // 2 + 100), slice(T - 100, T)):
        part = replace(p, x=p.x[tokens], topk_ids=ids[tokens], topk_weights=weights[tokens])
        want_y, want = in_fp64(part, grad[tokens])
        assert relative_error(y[tokens], want_y) <= 2e-2
        for name in ("x", "topk_weights"):
            assert relative_error(got[name][tokens], want[name]) <= 2e-2, name
    # The weights' gradients are sums over tokens: those of eight parts, added up.
    parts = [torch.zeros_like(p.gate_up, dtype=torch.float32), torch.zeros_like(p.down, dtype=torch.float32)]
    for tokens in torch.arange(T, device="cuda").chunk(8):
        part = replace(p, x=p.x[tokens], topk_ids=ids[tokens], topk_weights=weights[tokens])
        _, of_part = gradients(part, "triton", grad[tokens])
        for total, name in zip(parts, ("gate_up", "down")):
            total += of_part[name]
    for total, name in zip(parts, ("gate_up", "down")):
        assert relative_error(got[name], total) <= 2e-2, name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one() -> None:
    p, grad = large(bias=True)
    y, want = gradients(p, "triton", grad)
    names = [n for n in vars(p) if isinstance(getattr(p, n), Tensor)]
    q = replace(p, **{n: getattr(p, n).detach().to("cuda:1") for n in names})
    other = {n: getattr(q, n).requires_grad_() for n in names if n != "topk_ids"}
    out = forward(q, "triton")
    got = torch.autograd.grad(out, list(other.values()), grad.to("cuda:1"))
    assert torch.equal(out.cpu(), y.cpu())
    for name, value in zip(other, got):
        assert torch.equal(value.cpu(), want[name].cpu()), name
