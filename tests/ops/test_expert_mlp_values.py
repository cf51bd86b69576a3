"""`expert_mlp`: values and every gradient of both backends against the dense fp64 oracle."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_oracle import ACTIVATIONS, DIFFERENTIABLE, Problem, dense_gradients, make_problem, relative_error
from torch import Tensor

from dmoe.ops import expert_mlp, products

BACKENDS = ("reference", "torch")
# Relative, norm-wise; half-precision arguments are rounded before the oracle sees them.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

SHAPES: dict[str, dict[str, Any]] = {
    "plain case": {},
    "zero-token experts": {"E": 8, "only_experts": [1, 4, 6]},
    "no tokens": {"T": 0},
    "one token": {"T": 1},
    "one expert": {"E": 1, "K": 1},
    "every expert chosen": {"E": 4, "K": 4},
    "seven experts": {"E": 7, "K": 3},
    "all tokens on the last expert": {"E": 5, "K": 1, "only_experts": [4]},
    "top-1": {"K": 1},
    "rows of no multiple of 16 bytes": {"D": 7, "F": 5},
    "only D unaligned": {"D": 7, "F": 8},
    "only F unaligned": {"D": 16, "F": 5},
    "unaligned, no tokens": {"T": 0, "D": 7, "F": 5},
    "F of 1": {"F": 1},
    "more rows than one activation block": {"T": 700, "E": 3, "K": 2},
}


def gradients(p: Problem, backend: str, grad: Tensor, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Output of `expert_mlp` and its gradients by name. `changes` replace arguments (already leaves or views)."""
    leaves = {
        name: getattr(p, name).detach().clone().requires_grad_()
        for name in DIFFERENTIABLE
        if getattr(p, name) is not None
    }
    q = replace(p, **{**leaves, **changes})
    y = expert_mlp(*q.tensors(), activation=p.activation, backend=backend)
    y.backward(grad)
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_matches(p: Problem, backend: str, grad: Tensor | None = None, tolerance: float | None = None) -> None:
    grad = torch.randn(p.x.shape).to(p.x.dtype) if grad is None else grad
    tolerance = TOLERANCE[p.x.dtype] if tolerance is None else tolerance
    want_y, want = dense_gradients(p, grad)
    got_y, got = gradients(p, backend, grad)
    assert got_y.dtype == p.x.dtype
    assert relative_error(got_y, want_y) <= tolerance
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == getattr(p, name).dtype
        assert relative_error(got[name], want[name]) <= tolerance, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("case", SHAPES)
def test_shapes_in_fp32(case: str, bias: bool, backend: str) -> None:
    assert_matches(make_problem(bias=bias, **SHAPES[case]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("case", SHAPES)
def test_shapes_in_half_precision(case: str, dtype: torch.dtype, backend: str) -> None:
    assert_matches(make_problem(dtype=dtype, bias=True, **SHAPES[case]), backend)


@pytest.mark.parametrize("limit", [0.0, 1e9], ids=["grouped", "batched"])
@pytest.mark.parametrize("case", SHAPES)
def test_half_precision_with_padded_groups(case: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which groups are padded on the CPU, at any imbalance."""
    monkeypatch.setattr(products, "_PADDING_LIMIT", limit)
    assert_matches(make_problem(dtype=torch.bfloat16, bias=True, **SHAPES[case]), "torch")


def pre_activations(p: Problem) -> Tensor:
    """[T, E, H] in fp64."""
    h = torch.einsum("td,ehd->teh", p.x.double(), p.gate_up.double())
    return h if p.gate_up_bias is None else h + p.gate_up_bias.double()


def without_tokens_at_the_clamp(p: Problem) -> Problem:
    """Drop the tokens with a pre-activation near +-7, where rounding it to bf16 turns the derivative on or off."""
    h = pre_activations(p)
    keep = ((h.abs() - 7).abs() > 0.05).flatten(1).all(dim=1)
    assert keep.sum() >= 10
    gate, up = h[keep].chunk(2, dim=-1)
    for beyond in (gate > 7, gate < -7, up > 7, up < -7):
        assert beyond.any()
    return replace(p, x=p.x[keep], topk_ids=p.topk_ids[keep], topk_weights=p.topk_weights[keep])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("activation", "gated"), [(a, g) for a in ACTIVATIONS for g in (True, False) if g or a != "clamped_swiglu"]
)
def test_activations(activation: str, gated: bool, bias: bool, dtype: torch.dtype, backend: str) -> None:
    # Pre-activations of standard deviation 5: both sides of the clamp at 7, and saturated sigmoids.
    p = make_problem(60, activation=activation, gated=gated, bias=bias, dtype=dtype, h_scale=5.0)
    if activation == "clamped_swiglu":
        p = without_tokens_at_the_clamp(p)
    assert_matches(p, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["gelu", "clamped_swiglu"])
def test_padded_widths_keep_gate_and_up_apart(activation: str, backend: str) -> None:
    assert_matches(make_problem(D=7, F=5, bias=True, activation=activation, h_scale=5.0), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(backend: str) -> None:
    """`y.sum().backward()` hands the backward a scalar expanded with zero strides."""
    p = make_problem()
    want_y, want = dense_gradients(p, torch.ones(p.x.shape))
    x = p.x.clone().requires_grad_()
    gate_up, down = p.gate_up.clone().requires_grad_(), p.down.clone().requires_grad_()
    y = expert_mlp(x, p.topk_ids, p.topk_weights, gate_up, down, backend=backend)
    y.sum().backward()
    assert relative_error(y.detach(), want_y) <= 1e-5
    for name, leaf in (("x", x), ("gate_up", gate_up), ("down", down)):
        assert relative_error(leaf.grad, want[name]) <= 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_gradient(backend: str) -> None:
    grad = torch.randn(16, 13).t()
    assert not grad.is_contiguous()
    assert_matches(make_problem(T=13, D=16), backend, grad=grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["x", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias", "topk_ids"])
@pytest.mark.parametrize("width", [16, 7], ids=["aligned", "unaligned"])
def test_non_contiguous_arguments(name: str, width: int, backend: str) -> None:
    """Each argument in turn is a transposed view; its gradient arrives at the tensor behind the view."""
    p = make_problem(D=width, F=8 if width == 16 else 5, bias=True)
    grad = torch.randn(p.x.shape)
    want_y, want = dense_gradients(p, grad)
    base = getattr(p, name).transpose(-1, -2).contiguous()
    if name != "topk_ids":
        base.requires_grad_()
    view = base.transpose(-1, -2)
    assert not view.is_contiguous()
    got_y, got = gradients(p, backend, grad, **{name: view})
    assert relative_error(got_y, want_y) <= 1e-5
    for other in want:
        value = base.grad.transpose(-1, -2) if other == name else got[other]
        assert relative_error(value, want[other]) <= 1e-5, other


@pytest.mark.parametrize("backend", BACKENDS)
def test_x_that_is_a_strided_slice(backend: str) -> None:
    p = make_problem(T=6)
    wide = torch.cat([p.x, torch.full_like(p.x, float("nan"))], dim=1)
    y = expert_mlp(wide[:, :16], p.topk_ids, p.topk_weights, p.gate_up, p.down, backend=backend)
    assert relative_error(y, dense_gradients(p, torch.ones_like(p.x))[0]) <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_ids(backend: str) -> None:
    p = make_problem(bias=True)
    assert_matches(replace(p, topk_ids=p.topk_ids.int()), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [16, 7], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("trainable", [*DIFFERENTIABLE, "all but x", "none"])
def test_frozen_arguments(trainable: str, width: int, backend: str) -> None:
    """Only what is trainable gets a gradient, and it is the right one."""
    p = make_problem(D=width, bias=True)
    grad = torch.randn(p.x.shape)
    want_y, want = dense_gradients(p, grad)
    chosen = {"all but x": DIFFERENTIABLE[1:], "none": ()}.get(trainable, (trainable,))
    leaves = {n: getattr(p, n).clone().requires_grad_(n in chosen) for n in DIFFERENTIABLE}
    y = expert_mlp(*replace(p, **leaves).tensors(), backend=backend)
    assert relative_error(y.detach(), want_y) <= 1e-5
    assert y.requires_grad == bool(chosen)
    if chosen:
        y.backward(grad)
    for name, leaf in leaves.items():
        if name in chosen:
            assert relative_error(leaf.grad, want[name]) <= 1e-5, name
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_gives_the_same_bits(backend: str) -> None:
    p = make_problem(bias=True)
    leaf = replace(p, x=p.x.clone().requires_grad_())
    with torch.no_grad():
        inference = expert_mlp(*leaf.tensors(), backend=backend)
    with torch.inference_mode():
        torch.testing.assert_close(expert_mlp(*leaf.tensors(), backend=backend), inference, rtol=0, atol=0)
    assert torch.equal(inference, expert_mlp(*leaf.tensors(), backend=backend).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_are_left_alone(backend: str) -> None:
    p = make_problem(bias=True)
    before = [t.clone() for t in p.tensors()]
    gradients(p, backend, torch.randn(p.x.shape))
    assert all(torch.equal(a, b) for a, b in zip(p.tensors(), before, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_gradcheck_of_the_reference(activation: str, gated: bool) -> None:
    p = make_problem(T=3, D=3, E=3, F=2, gated=gated, bias=True, dtype=torch.float64)
    weights = p.topk_weights.double()
    leaves = [t.requires_grad_() for t in (p.x, weights, p.gate_up, p.down, p.gate_up_bias, p.down_bias)]

    def run(x: Tensor, w: Tensor, *rest: Tensor) -> Tensor:
        return expert_mlp(x, p.topk_ids, w, *rest, activation=activation, backend="reference")

    assert torch.autograd.gradcheck(run, leaves)
    if activation == "silu":
        assert torch.autograd.gradgradcheck(run, leaves)


def test_fp64_goes_to_the_reference_by_itself() -> None:
    p = make_problem(dtype=torch.float64)
    p = replace(p, topk_weights=p.topk_weights.double())
    y = expert_mlp(*p.tensors())
    assert relative_error(y, dense_gradients(p, torch.ones_like(p.x))[0]) <= 1e-14


def test_the_torch_backend_refuses_a_second_derivative() -> None:
    """Its backward is written by hand; without the refusal a gradient penalty would silently be a constant."""
    p = make_problem()
    x = p.x.requires_grad_()
    (first,) = torch.autograd.grad(expert_mlp(*p.tensors(), backend="torch").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(first.square().sum() + x.sum(), x)
