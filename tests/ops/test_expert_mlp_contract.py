"""`expert_mlp`: what it promises beside the values: memory, autocast, compilation, isolation of tokens, errors."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_oracle import DIFFERENTIABLE, Problem, dense_gradients, make_problem, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.errors import ConfigError
from dmoe.ops import choose_backend, expert_mlp, grouped, products

BACKENDS = ("reference", "torch")


def with_leaves(p: Problem) -> tuple[Problem, dict[str, Tensor]]:
    leaves = {n: getattr(p, n).clone().requires_grad_() for n in DIFFERENTIABLE if getattr(p, n) is not None}
    return replace(p, **leaves), leaves


def saved_bytes(p: Problem) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward of one call."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return t

    q, _ = with_leaves(p)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = expert_mlp(*q.tensors(), backend="torch")
    assert y.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_memory_kept_for_the_backward(gated: bool, dtype: torch.dtype) -> None:
    """x, the pre-activation H, the routing weights, the permutation and the parameters; nothing else of size R."""
    T, D, E, K, F = 200, 32, 4, 2, 24
    H, R, size = 2 * F if gated else F, T * K, dtype.itemsize
    p = make_problem(T, D, E, K, F, gated=gated, bias=True, dtype=dtype)
    if dtype.itemsize == 2:  # groups are padded
        R = int(products.padded_sizes(torch.bincount(p.topk_ids.flatten(), minlength=E), H * D).sum())
        assert T * K < R <= 1.6 * T * K
    parameters = (E * H * D + E * D * F + E * H + E * D) * size
    routing = 8 * T * K + 4 * T * K  # ids int64, weights fp32
    permutation = 8 * R + 8 * T * K + 4 * E  # order, inverse, offsets
    assert saved_bytes(p) == T * D * size + R * H * size + parameters + routing + permutation


class _RowsOfPreActivations(TorchDispatchMode):
    """Notes how many rows of h a forward returns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.dmoe.expert_mlp.default:
            self.rows.append(out[1].shape[0])
        return out


def test_nothing_is_kept_without_grad() -> None:
    """Under no_grad the operator returns a pre-activation without rows."""
    q, _ = with_leaves(make_problem())
    with _RowsOfPreActivations() as noted:
        with torch.no_grad():
            expert_mlp(*q.tensors(), backend="torch")
        expert_mlp(*q.tensors(), backend="torch")
    assert noted.rows == [0, 26]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [16, 7], ids=["aligned", "unaligned"])
def test_autocast(width: int, backend: str) -> None:
    """fp32 arguments under bf16 autocast: bf16 out, the values of rounded arguments, gradients in fp32."""
    p = make_problem(D=width, bias=True)
    grad = torch.randn(p.x.shape).bfloat16()
    rounded = {n: getattr(p, n).bfloat16() for n in DIFFERENTIABLE if n != "topk_weights"}
    want_y, want = dense_gradients(replace(p, **rounded), grad)
    q, leaves = with_leaves(p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_mlp(*q.tensors(), backend=backend)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.detach(), want_y) <= 2e-2
    y.backward(grad)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert relative_error(leaf.grad, want[name]) <= 2e-2, name


def test_autocast_leaves_fp64_alone() -> None:
    p = make_problem(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = expert_mlp(*p.tensors())
    assert y.dtype == torch.float64
    assert relative_error(y, dense_gradients(p, torch.ones_like(p.x))[0]) <= 1e-7  # fp32 routing weights


@pytest.mark.parametrize("width", [16, 7], ids=["aligned", "unaligned"])
def test_compiled_equals_eager(width: int) -> None:
    """One graph, forward and backward, and a second batch size without an error."""

    def run(*tensors: Tensor) -> Tensor:
        return expert_mlp(*tensors, activation="gelu", backend="torch")

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for tokens in (13, 20):
        p = make_problem(tokens, D=width, bias=True)
        grad = torch.randn(p.x.shape)
        results = []
        for function in (run, compiled):
            q, leaves = with_leaves(p)
            y = function(*q.tensors())
            y.backward(grad)
            results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_operators_pass_opcheck(bias: bool, ids_dtype: torch.dtype) -> None:
    """Schema, fake tensors with the metadata of the real ones, tracing with dynamic shapes."""
    p = make_problem(bias=bias)
    tensors = replace(p, topk_ids=p.topk_ids.to(ids_dtype)).tensors()
    for save in (True, False):
        torch.library.opcheck(grouped._expert_mlp, (*tensors, "silu", save, False))
    kept = grouped._expert_mlp(*tensors, "silu", True, False)[1:]
    for needs in ([True] * 4 + [bias] * 2, [False, True, False, True, False, False]):
        args = (torch.randn(p.x.shape), *tensors, *kept, "silu", needs)
        torch.library.opcheck(grouped._expert_mlp_backward, args)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("T", [1, 6, 64])
def test_tokens_do_not_see_each_other(T: int, dtype: torch.dtype, backend: str) -> None:
    """With the routing fixed, a token's output has the same bits when every other token is NaN."""
    p = make_problem(T, D=32, F=24, dtype=dtype, bias=True)
    want = expert_mlp(*p.tensors(), backend=backend)
    for t in {0, T // 2, T - 1}:
        x = torch.full_like(p.x, float("nan"))
        x[t] = p.x[t]
        y = expert_mlp(*replace(p, x=x).tensors(), backend=backend)
        assert torch.equal(y[t], want[t])
        assert y.isnan().all(dim=1).sum() == T - 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_have_the_same_bits(backend: str) -> None:
    p = make_problem(300, bias=True)
    grad = torch.randn(p.x.shape)
    results = []
    for _ in range(2):
        q, leaves = with_leaves(p)
        y = expert_mlp(*q.tensors(), backend=backend)
        y.backward(grad)
        results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_choose_backend() -> None:
    assert choose_backend(torch.empty(1, dtype=torch.float64)) == "reference"
    assert {choose_backend(torch.empty(1, dtype=d)) for d in (torch.float32, torch.bfloat16)} == {"torch"}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x of three dims": ({"x": torch.zeros(1, 13, 16)}, r"x_TD is of shape \(1, 13, 16\)"),
    "x of integers": ({"x": torch.zeros(13, 16, dtype=torch.int64)}, "x_TD is torch.int64"),
    "ids of one dim": ({"topk_ids": torch.zeros(13, dtype=torch.int64)}, r"topk_ids_TK is of shape \(13,\)"),
    "ids for fewer tokens": ({"topk_ids": torch.zeros(12, 2, dtype=torch.int64)}, r"topk_ids_TK is of shape \(12, 2\)"),
    "ids of floats": ({"topk_ids": torch.zeros(13, 2)}, "topk_ids_TK is torch.float32"),
    "weights of other shape": ({"topk_weights": torch.zeros(13, 3)}, r"topk_weights_TK: \(13, 3\)"),
    "weights of integers": ({"topk_weights": torch.zeros(13, 2, dtype=torch.int64)}, "topk_weights_TK is torch.int64"),
    "down of two dims": ({"down": torch.zeros(4, 16)}, r"down_proj is of shape \(4, 16\)"),
    "down of other width": ({"down": torch.zeros(4, 17, 8)}, r"down_proj is of shape \(4, 17, 8\)"),
    "down without columns": ({"down": torch.zeros(4, 16, 0)}, r"down_proj is of shape \(4, 16, 0\)"),
    "down of other dtype": ({"down": torch.zeros(4, 16, 8, dtype=torch.bfloat16)}, "down_proj is torch.bfloat16"),
    "gate_up of other width": ({"gate_up": torch.zeros(4, 16, 17)}, r"gate_up_proj is of shape \(4, 16, 17\)"),
    "gate_up of 3F rows": ({"gate_up": torch.zeros(4, 24, 16)}, r"gate_up_proj is of shape \(4, 24, 16\)"),
    "gate_up of fewer experts": ({"gate_up": torch.zeros(3, 16, 16)}, r"gate_up_proj is of shape \(3, 16, 16\)"),
    "gate_up of other dtype": ({"gate_up": torch.zeros(4, 16, 16).half()}, "gate_up_proj is torch.float16"),
    "gate_up_bias of other shape": ({"gate_up_bias": torch.zeros(4, 8)}, r"gate_up_bias is of shape \(4, 8\)"),
    "down_bias of other shape": ({"down_bias": torch.zeros(16)}, r"down_bias is of shape \(16,\)"),
    "down_bias of other dtype": ({"down_bias": torch.zeros(4, 16).half()}, "down_bias is torch.float16"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", BAD)
def test_wrong_arguments_are_named(case: str, backend: str) -> None:
    changes, message = BAD[case]
    p = replace(make_problem(T=13, D=16, E=4, K=2, F=8, bias=True), **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        expert_mlp(*p.tensors(), backend=backend)
    assert "must be" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_wrong_choices_are_named() -> None:
    p = make_problem()
    with pytest.raises(ConfigError, match="backend is 'cuda': must be one of reference, torch, triton"):
        expert_mlp(*p.tensors(), backend="cuda")
    with pytest.raises(ConfigError, match="activation is 'swish': must be one of silu"):
        expert_mlp(*p.tensors(), activation="swish")
    with pytest.raises(ConfigError, match="activation is 'clamped_swiglu' with plain experts"):
        expert_mlp(*make_problem(gated=False).tensors(), activation="clamped_swiglu")
    for backend in ("torch", "triton"):
        with pytest.raises(ConfigError, match=f"backend is '{backend}' for an fp64 input"):
            expert_mlp(*make_problem(dtype=torch.float64).tensors(), backend=backend)


def test_triton_on_a_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter; one line that says what to choose instead."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="backend is 'triton' for an input on cpu: must be 'torch' or None") as caught:
        expert_mlp(*make_problem().tensors(), backend="triton")
    assert "\n" not in str(caught.value)


def test_the_package_imports_no_triton() -> None:
    code = (
        "import sys, torch, dmoe, dmoe.ops\n"
        "dmoe.ops.expert_mlp(torch.ones(2, 8), torch.zeros(2, 1).long(), torch.ones(2, 1), torch.ones(1, 16, 8),"
        " torch.ones(1, 8, 8)).sum()\n"
        "assert not [name for name in sys.modules if name.startswith(('dmoe.ops.kernels', 'dmoe.ops.triton'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
