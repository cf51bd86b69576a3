"""The triton backend of `expert_mlp` against the dense fp64 oracle: values, gradients, memory, bits.

Run by `test_expert_kernels.py` in the interpreter, with tiles so small that a few rows cross several of them, and by
`tests/gpu/test_triton_experts_gpu.py` with the tiles of the GPU, there for the torch backend too.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_oracle import ACTIVATIONS, DIFFERENTIABLE, Problem, dense_gradients, make_problem, relative_error
from interpreted import DEVICE
from rows_kernel_cases import poison as poison_small
from test_expert_mlp_values import without_tokens_at_the_clamp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmoe.ops import expert_mlp, triton_experts
from dmoe.ops.kernels.launch import Tile
from dmoe.ops.kernels.tuned import Tiles

IN_INTERPRETER = DEVICE == "cpu"
BACKENDS = ("triton",) if IN_INTERPRETER else ("triton", "torch")
# The interpreter multiplies the raw bits of bf16. fp32 is exact there, and goes through tf32 on a GPU, where an operand
# is cut off after 10 bits of the mantissa: the three products of a gated expert lose 2.3e-3.
DTYPES = (torch.float32, torch.float16) if IN_INTERPRETER else (torch.bfloat16, torch.float16, torch.float32)
MAIN_DTYPE = DTYPES[0]
TOLERANCE = {torch.float32: 1e-5 if IN_INTERPRETER else 3e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}

_ROWS = Tile(block_m=16, block_n=32, block_k=16, group_m=2, split=2, warps=4, stages=2)
_GRADIENT = replace(_ROWS, block_n=16)
SMALL = Tiles(_ROWS, replace(_ROWS, split=4), replace(_ROWS, block_n=64), _ROWS, _GRADIENT, replace(_GRADIENT, split=1))
WIDE = Tiles(*[replace(_ROWS, block_m=32, block_k=32, group_m=3, split=1)] * 6)

CASES: dict[str, dict[str, Any]] = {
    "tiles of every kind": {"T": 30, "D": 40, "F": 72, "E": 4, "K": 2, "bias": True},
    "seven experts": {"T": 30, "D": 24, "F": 40, "E": 7, "K": 3},
    "every expert chosen": {"E": 4, "K": 4},
    "one expert": {"T": 35, "E": 1, "K": 1, "bias": True},
    "all tokens on one expert": {"T": 40, "E": 5, "K": 1, "only_experts": [3]},
    "all tokens on the last expert": {"T": 20, "E": 6, "K": 1, "only_experts": [5], "bias": True},
    "most experts get none": {"T": 20, "E": 9, "K": 2, "only_experts": [2, 7], "bias": True},
    "rows that fill their tiles": {"T": 32, "E": 2, "K": 1, "only_experts": [0]},
    "more experts than tokens": {"T": 3, "E": 60, "K": 2},
    "one token": {"T": 1, "bias": True},
    "no token": {"T": 0},
    "no token, with biases": {"T": 0, "bias": True},
    "odd widths": {"D": 20, "F": 5, "bias": True},
    "odd widths, plain": {"D": 20, "F": 5, "bias": True, "gated": False},
    "widths of 1": {"D": 1, "F": 1},
    "plain": {"T": 40, "D": 24, "F": 72, "gated": False},
    "plain with biases": {"T": 30, "D": 24, "F": 40, "gated": False, "bias": True},
}
# Every case in the first dtype, some in the others.
OTHERS = ("tiles of every kind", "most experts get none", "no token", "odd widths", "plain with biases")
PAIRS = [(case, dtype) for dtype in DTYPES for case in CASES if dtype == MAIN_DTYPE or case in OTHERS]


@pytest.fixture(autouse=True)
def setting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tiles and NaN in fresh memory for the interpreter; tf32 for a GPU."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if IN_INTERPRETER else "high")
    if IN_INTERPRETER:
        monkeypatch.setattr(triton_experts, "choose_tiles", lambda *_: SMALL)
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, and the largest integer
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before)


def poison() -> None:
    """Leave freed memory full of NaN, on a GPU also a block that large tensors are cut from."""
    poison_small()
    if not IN_INTERPRETER:
        torch.full((2**26,), float("nan"), device=DEVICE)


def on_device(p: Problem, trainable: tuple[str, ...] = DIFFERENTIABLE) -> tuple[Problem, dict[str, Tensor]]:
    """The problem where it is computed, and its leaves by name."""
    given = (*DIFFERENTIABLE, "topk_ids")
    moved = {n: getattr(p, n).detach().clone().to(DEVICE) for n in given if getattr(p, n) is not None}
    return replace(p, **moved), {n: moved[n].requires_grad_() for n in trainable if n in moved}


def forward(p: Problem, backend: str) -> Tensor:
    return expert_mlp(*p.tensors(), activation=p.activation, backend=backend)  # type: ignore[arg-type]


def gradients(
    p: Problem, backend: str, grad: Tensor, trainable: tuple[str, ...] = DIFFERENTIABLE
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients, computed in memory that was full of NaN; None where there is no gradient."""
    q, leaves = on_device(p, trainable)
    poison()
    y = forward(q, backend)
    poison()
    y.backward(grad.to(DEVICE))
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_agrees(p: Problem, backend: str, grad: Tensor | None = None, tolerance: float | None = None) -> None:
    """Output and all gradients have the dtype of what they belong to and the values of the oracle."""
    grad = torch.randn(p.x.shape).to(p.x.dtype) if grad is None else grad
    tolerance = TOLERANCE[p.x.dtype] if tolerance is None else tolerance
    want_y, want = dense_gradients(p, grad)
    y, got = gradients(p, backend, grad)
    assert y.dtype == p.x.dtype
    assert relative_error(y.cpu(), want_y) <= tolerance
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == getattr(p, name).dtype
        assert relative_error(got[name].cpu(), want[name]) <= tolerance, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "dtype"), PAIRS, ids=str)
def test_agrees_with_the_oracle(case: str, dtype: torch.dtype, backend: str) -> None:
    assert_agrees(make_problem(**CASES[case], dtype=dtype), backend)


@pytest.mark.skipif(not IN_INTERPRETER, reason="tiles for the interpreter")
@pytest.mark.parametrize("case", ["tiles of every kind", "plain with biases", "odd widths"])
def test_other_tiles(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_experts, "choose_tiles", lambda *_: WIDE)
    assert_agrees(make_problem(**CASES[case]), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("activation", "gated"), [(a, g) for a in ACTIVATIONS for g in (True, False) if g or a != "clamped_swiglu"]
)
def test_activations(activation: str, gated: bool, backend: str) -> None:
    # Pre-activations of standard deviation 5: both sides of the clamp at 7, and saturated sigmoids.
    T = 60 if activation == "clamped_swiglu" else 16
    p = make_problem(T, activation=activation, gated=gated, bias=True, dtype=MAIN_DTYPE, h_scale=5.0)
    if activation == "clamped_swiglu":
        p = without_tokens_at_the_clamp(p)
    assert_agrees(p, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_arguments(backend: str) -> None:
    """Only what is trainable gets a gradient, and it has the bits that it has when everything is trainable."""
    p = make_problem(T=9, bias=True, dtype=MAIN_DTYPE)
    grad = torch.randn(p.x.shape).to(MAIN_DTYPE)
    want_y, want = gradients(p, backend, grad)
    for trainable in (*[(name,) for name in DIFFERENTIABLE], DIFFERENTIABLE[1:], ("x", "topk_weights", "down_bias")):
        y, got = gradients(p, backend, grad, trainable)
        assert torch.equal(y, want_y)
        assert set(got) == set(trainable)
        for name in trainable:
            assert torch.equal(got[name], want[name]), (name, trainable)
    y = forward(on_device(p, ())[0], backend)
    assert torch.equal(y, want_y)
    assert not y.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_ids(backend: str) -> None:
    p = make_problem(bias=True, dtype=MAIN_DTYPE)
    assert_agrees(replace(p, topk_ids=p.topk_ids.int()), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_routing_weights_of_half_precision(backend: str) -> None:
    p = make_problem(dtype=MAIN_DTYPE)
    assert_agrees(replace(p, topk_weights=p.topk_weights.half()), backend, tolerance=max(3e-3, TOLERANCE[MAIN_DTYPE]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["expanded scalar", "expanded row", "transposed"])
def test_strides_of_the_gradient(kind: str, backend: str) -> None:
    p = make_problem(bias=True, dtype=MAIN_DTYPE)
    grads = {
        "expanded scalar": torch.ones((), dtype=MAIN_DTYPE).expand(13, 16),
        "expanded row": torch.randn(16).to(MAIN_DTYPE).expand(13, 16),
        "transposed": torch.randn(16, 13).to(MAIN_DTYPE).t(),
    }
    assert not grads[kind].is_contiguous()
    assert_agrees(p, backend, grads[kind])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [16, 20], ids=["aligned", "unaligned"])
def test_strides_of_the_arguments(width: int, backend: str) -> None:
    p = make_problem(D=width, F=8 if width == 16 else 5, bias=True, dtype=MAIN_DTYPE)
    grad = torch.randn(p.x.shape).to(MAIN_DTYPE)
    want_y, want = gradients(p, backend, grad)
    names = (*DIFFERENTIABLE, "topk_ids")
    q, leaves = on_device(replace(p, **{n: getattr(p, n).transpose(-1, -2).contiguous() for n in names}))
    views = {n: getattr(q, n).transpose(-1, -2) for n in names}
    y = forward(replace(q, **views), backend)
    y.backward(grad.to(DEVICE))
    assert torch.equal(y, want_y)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad.transpose(-1, -2), want[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_have_the_same_bits(backend: str) -> None:
    p = make_problem(T=24, D=24, F=40, E=4, K=2, bias=True, dtype=MAIN_DTYPE)
    grad = torch.randn(p.x.shape).to(MAIN_DTYPE)
    y, first = gradients(p, backend, grad)
    for _ in range(1 if IN_INTERPRETER else 5):
        again, second = gradients(p, backend, grad)
        assert torch.equal(again, y)
        assert all(torch.equal(second[name], first[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_do_not_see_each_other(backend: str) -> None:
    """With the routing fixed, a token's output and gradient have the same bits when every other token is NaN."""
    p = make_problem(T=30, D=24, F=20, E=3, K=2, bias=True, dtype=MAIN_DTYPE)
    grad = torch.randn(p.x.shape).to(MAIN_DTYPE)
    want_y, want = gradients(p, backend, grad)
    for t in (0, 17):
        x, grad_of_one = torch.full_like(p.x, float("nan")), torch.full_like(grad, float("nan"))
        x[t], grad_of_one[t] = p.x[t], grad[t]
        y, got = gradients(replace(p, x=x), backend, grad_of_one)
        for value, expected in ((y, want_y), (got["x"], want["x"]), (got["topk_weights"], want["topk_weights"])):
            assert torch.equal(value[t], expected[t])
        assert y.isnan().all(dim=1).sum() == 29


@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_do_not_see_each_other(backend: str) -> None:
    """NaN in the tokens of one expert does not reach the weight gradients of its two neighbours."""
    p = make_problem(T=45, D=24, F=20, E=3, K=1, bias=True, dtype=MAIN_DTYPE)
    grad = torch.randn(p.x.shape).to(MAIN_DTYPE)
    _, want = gradients(p, backend, grad)
    bad = p.topk_ids[:, 0] == 1
    x, bad_grad = p.x.clone(), grad.clone()
    x[bad] = bad_grad[bad] = float("nan")
    _, got = gradients(replace(p, x=x), backend, bad_grad)
    for name in ("gate_up", "down", "gate_up_bias"):
        assert torch.equal(got[name][[0, 2]], want[name][[0, 2]]), name
        assert got[name][1].isnan().any()


def kept_beside_arguments(p: Problem, backend: str) -> list[Tensor]:
    """What autograd keeps for the backward of one call, each storage once."""
    q, _ = on_device(p)
    arguments = {t.untyped_storage().data_ptr() for t in q.tensors() if t is not None}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = forward(q, backend)
    assert y.requires_grad
    return [t for place, t in kept.items() if place not in arguments]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_memory_kept_for_the_backward(gated: bool, dtype: torch.dtype, backend: str) -> None:
    """The pre-activation and the permutation, to the byte; nothing of the size of the gathered tokens."""
    T, D, E, K, F = 50, 64, 4, 3, 24
    H = 2 * F if gated else F
    kept = kept_beside_arguments(make_problem(T, D, E, K, F, gated=gated, bias=True, dtype=dtype), backend)
    indices = {"triton": 4, "torch": 8}[backend]
    # h, order and inverse of the permutation, the ends of the experts' rows.
    assert sum(t.untyped_storage().nbytes() for t in kept) == T * K * (H * dtype.itemsize + 2 * indices) + 4 * E
    assert (T * K, D) not in [tuple(t.shape) for t in kept]


class _RowsOfPreActivations(TorchDispatchMode):
    """Notes how many rows of h a forward returns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.dmoe.expert_mlp_triton.default:
            self.rows.append(out[1].shape[0])
        return out


def test_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens take the kernels of decoding; more the same kernels as in training, and h is not written."""
    p = make_problem(T=20, bias=True, dtype=MAIN_DTYPE)
    q, _ = on_device(p)
    want = forward(q, "triton").detach()
    with torch.no_grad():
        few = forward(q, "triton")
        assert relative_error(few, want) <= TOLERANCE[MAIN_DTYPE]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(triton_experts, "DECODE_MAX_MEAN", 40 // p.down.shape[0] - 1)
        assert torch.equal(forward(q, "triton"), want)
    monkeypatch.setattr(triton_experts, "DECODE_MAX_TOKENS", 19)
    with _RowsOfPreActivations() as noted:
        with torch.no_grad():
            assert torch.equal(forward(q, "triton"), want)
        assert torch.equal(forward(q, "triton").detach(), want)
    assert noted.rows == [0, 40]


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_alone(backend: str) -> None:
    q, leaves = on_device(make_problem(bias=True, dtype=MAIN_DTYPE))
    before = [t.detach().clone() for t in q.tensors() if t is not None]
    grad = torch.randn_like(q.x)
    unchanged = grad.clone()
    torch.autograd.grad(forward(q, backend), list(leaves.values()), grad)
    assert all(torch.equal(a, b) for a, b in zip(q.tensors(), before, strict=True))
    assert torch.equal(grad, unchanged)


def test_weights_that_start_anywhere_in_a_buffer() -> None:
    p = make_problem(dtype=MAIN_DTYPE)
    q, _ = on_device(p)
    buffer = torch.cat([p.gate_up.new_zeros(3), p.gate_up.reshape(-1), p.down.reshape(-1)]).to(q.x.device)
    gate_up, down = buffer[3:].split([p.gate_up.numel(), p.down.numel()])
    moved = replace(q, gate_up=gate_up.view(p.gate_up.shape), down=down.view(p.down.shape))
    assert moved.gate_up.data_ptr() % 16
    torch.testing.assert_close(forward(moved, "triton"), forward(q, "triton"), rtol=0, atol=0)
