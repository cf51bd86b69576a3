"""The triton backend of `expert_mlp` under autograd, `torch.func`, autocast and the compiler.

Run as `expert_kernel_cases.py` is.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_oracle import make_problem
from expert_kernel_cases import BACKENDS, IN_INTERPRETER, MAIN_DTYPE, forward, on_device, setting  # noqa: F401
from interpreted import DEVICE
from torch import Tensor

from dmoe.errors import ConfigError
from dmoe.ops import expert_mlp, triton_experts
from dmoe.ops.early import inputs_first


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_gradients(backend: str) -> None:
    """torch.func sees the same derivative; vmap goes call by call, and not through a backward."""
    q, leaves = on_device(make_problem(bias=True, dtype=MAIN_DTYPE))
    rest = (q.topk_weights, q.gate_up, q.down, q.gate_up_bias, q.down_bias)

    def loss(x: Tensor, *others: Tensor) -> Tensor:
        weights, *parameters = others
        return expert_mlp(x, q.topk_ids, weights, *parameters, backend=backend).float().square().sum()

    want = torch.autograd.grad(loss(q.x, *rest), list(leaves.values()))
    detached = [t.detach() for t in (q.x, *rest)]
    got = torch.func.grad(loss, argnums=tuple(range(6)))(*detached)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    def of_x(x: Tensor) -> Tensor:
        return forward(replace(q, x=x), backend)

    xs = torch.stack([q.x.detach(), q.x.detach().flip(0)])
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(of_x)(xs), torch.stack([of_x(x) for x in xs]))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(of_x)(xs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend: str) -> None:
    q, leaves = on_device(make_problem(dtype=MAIN_DTYPE))
    (first,) = torch.autograd.grad(forward(q, backend).float().square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=f'backend "{backend}" is not differentiable twice'):
        torch.autograd.grad(first.float().square().sum() + leaves["x"].float().sum(), leaves["x"])


def test_gradients_of_inputs_may_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, handed over before any gradient of a weight is computed."""
    problem, log = make_problem(T=30, E=7, K=3, bias=True, dtype=MAIN_DTYPE), []
    of_weights = triton_experts.weight_gradient

    def logged(*args: Any) -> Tensor:
        log.append("weights")
        return of_weights(*args)

    def run(early: bool) -> dict[str, Tensor]:
        q, leaves = on_device(problem)
        receiver = lambda *grads: log.append(tuple(g.clone() for g in grads))  # noqa: E731
        with inputs_first(receiver) if early else nullcontext():
            y = forward(q, "triton")
        y.backward(torch.ones_like(y))
        return {name: leaf.grad for name, leaf in leaves.items()}

    want = run(False)
    monkeypatch.setattr(triton_experts, "weight_gradient", logged)
    got = run(True)
    assert all(torch.equal(got[name], want[name]) for name in want)
    (first, *rest) = log
    assert torch.equal(first[0], want["x"])
    assert torch.equal(first[1], want["topk_weights"])
    assert rest == ["weights"] * 3  # of two projections, and of the bias of the first


WANTED = {
    "no routing weights": (("x", "gate_up"), ("x", "gate_up")),
    "frozen experts": (("x", "topk_weights"), ("x", "topk_weights")),
    "a backward for the experts alone": (("x", "topk_weights", "gate_up", "down"), ("gate_up", "down")),
}


@pytest.mark.parametrize(("trainable", "wanted"), WANTED.values(), ids=WANTED)
def test_gradients_that_go_nowhere_are_not_handed_over(trainable: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    q, leaves = on_device(make_problem(dtype=MAIN_DTYPE), trainable)
    with inputs_first(lambda *_: pytest.fail("handed over")):
        y = forward(q, "triton")
    grads = torch.autograd.grad(y.float().sum(), [leaves[name] for name in wanted])
    assert all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp64_is_refused(backend: str) -> None:
    q, _ = on_device(make_problem(dtype=torch.float64))
    with pytest.raises(ConfigError, match=f"backend is '{backend}' for an fp64 input"):
        forward(q, backend)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_operators_pass_opcheck(bias: bool) -> None:
    """Schema, fake tensors with the metadata of the real ones, tracing with dynamic shapes."""
    q, _ = on_device(make_problem(T=4, bias=bias, dtype=MAIN_DTYPE), ())
    tensors = replace(q, topk_ids=q.topk_ids.int() if bias else q.topk_ids).tensors()
    operators = torch.ops.dmoe
    for save in (True, False):
        torch.library.opcheck(operators.expert_mlp_triton.default, (*tensors, "silu", save))
    kept = operators.expert_mlp_triton(*tensors, "silu", True)[1:]
    needs = [True] * 6 if bias else [False, True, False, True, False, False]
    args = (torch.randn_like(q.x), *tensors, *kept, "silu", needs)
    torch.library.opcheck(operators.expert_mlp_triton_backward.default, args)


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    q, _ = on_device(make_problem(T=4, bias=True, dtype=MAIN_DTYPE), ())
    kept = torch.ops.dmoe.expert_mlp_triton(*q.tensors(), "silu", True)[1:]
    for wanted in range(6):
        needs = [n == wanted for n in range(6)]
        outputs = torch.ops.dmoe.expert_mlp_triton_backward(torch.randn_like(q.x), *q.tensors(), *kept, "silu", needs)
        assert [t.numel() > 0 for t in outputs] == needs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [16, 20], ids=["aligned", "unaligned"])
def test_compiled_equals_eager(width: int, backend: str) -> None:
    """One graph, forward and backward; another batch size, and no token, without an error."""

    def run(*tensors: Tensor) -> Tensor:
        return expert_mlp(*tensors, activation="gelu", backend=backend)

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager" if IN_INTERPRETER else "inductor")
    for tokens in (4, 9, 0):
        p = make_problem(tokens, D=width, bias=True, dtype=MAIN_DTYPE)
        grad = torch.randn(p.x.shape).to(DEVICE, MAIN_DTYPE)
        results = []
        for function in (run, compiled):
            q, leaves = on_device(p)
            y = function(*q.tensors())
            results.append([y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


class _NoGradient(torch.autograd.Function):
    """What follows may give None for the gradient of y: it counts as zeros."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_of_the_output(backend: str) -> None:
    q, leaves = on_device(make_problem(bias=True, dtype=MAIN_DTYPE))
    _NoGradient.apply(forward(q, backend)).sum().backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_under_autocast_is_as_exact(backend: str) -> None:
    """The backward of a loss is often called under autocast, which must not round products in fp32."""
    p = make_problem(T=30, bias=True, dtype=MAIN_DTYPE)
    q, leaves = on_device(p)
    y = forward(q, backend)
    grad = torch.randn_like(y)
    want = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
    with torch.autocast(y.device.type, torch.bfloat16):
        got = torch.autograd.grad(y, list(leaves.values()), grad)
    assert all(map(torch.equal, got, want))
