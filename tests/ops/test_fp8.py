"""`expert_mlp` with precision="fp8" as a whole, against an fp64 model of the recipe. The rounding: test_scaled.py."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_oracle import ACTIVATIONS, DIFFERENTIABLE, Problem, dense_gradients, make_problem, relative_error
from fp8_oracle import oracle
from torch import Tensor

from dmoe import MoE, MoEConfig
from dmoe.errors import ConfigError
from dmoe.ops import expert_mlp, fp8, products


def with_leaves(p: Problem) -> tuple[Problem, dict[str, Tensor]]:
    leaves = {n: getattr(p, n).clone().requires_grad_() for n in DIFFERENTIABLE if getattr(p, n) is not None}
    return replace(p, **leaves), leaves


def run(p: Problem, grad: Tensor, precision: str = "fp8") -> tuple[Tensor, dict[str, Tensor]]:
    q, leaves = with_leaves(p)
    y = expert_mlp(*q.tensors(), activation=p.activation, precision=precision)
    y.backward(grad)
    return y.detach(), {n: leaf.grad for n, leaf in leaves.items()}


SHAPES: dict[str, dict[str, Any]] = {
    "plain case": {},
    "zero-token experts": {"E": 8, "only_experts": [1, 4, 6]},
    "no tokens": {"T": 0},
    "one token": {"T": 1},
    "one expert": {"E": 1, "K": 1},
    "every expert chosen": {"E": 4, "K": 4},
    "seven experts": {"E": 7, "K": 3},
    "all tokens on the last expert": {"E": 5, "K": 1, "only_experts": [4]},
    "more rows than one activation block": {"T": 700, "E": 3, "K": 2},
    "plain experts": {"gated": False},
}


def assert_matches_oracle(p: Problem) -> None:
    grad = torch.randn(p.x.shape).to(p.x.dtype)
    want_y, want = oracle(p, grad)
    got_y, got = run(p, grad)
    assert got_y.dtype == p.x.dtype
    # Three to seven times less than what the rounding to 8 bits does: it is the same rounding.
    assert relative_error(got_y, want_y) <= 1e-2
    for name in want:
        assert got[name].dtype == getattr(p, name).dtype
        assert relative_error(got[name], want[name]) <= 1e-2, name


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("case", SHAPES)
def test_shapes(case: str, bias: bool) -> None:
    assert_matches_oracle(make_problem(**{"D": 32, "F": 48, "bias": bias, "dtype": torch.bfloat16, **SHAPES[case]}))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, gated: bool) -> None:
    if name == "clamped_swiglu" and not gated:
        pytest.skip("gated only")
    p = make_problem(60, 32, F=32, gated=gated, activation=name, h_scale=4.0, bias=True, dtype=torch.bfloat16)
    assert_matches_oracle(p)


@pytest.mark.parametrize("limit", [0.0, 1e9], ids=["grouped", "batched"])
@pytest.mark.parametrize("case", SHAPES)
def test_padded_groups(case: str, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PADDING_LIMIT", limit)
    assert_matches_oracle(make_problem(**{"D": 32, "F": 48, "bias": True, "dtype": torch.bfloat16, **SHAPES[case]}))


def test_error_of_the_recipe() -> None:
    """Against the exact result: 2 to 3 % a rounded operand, and weight gradients no worse than their inputs."""
    p = make_problem(400, 128, E=8, F=64, dtype=torch.bfloat16)
    grad = torch.randn(p.x.shape).bfloat16()
    want_y, want = dense_gradients(p, grad)
    got_y, got = run(p, grad)
    errors = {"y": relative_error(got_y, want_y)} | {n: relative_error(got[n], want[n]) for n in want}
    assert all(0.02 < error < 0.08 for error in errors.values()), errors


@pytest.mark.parametrize("exponent", [-60, 12])
def test_gradients_of_any_size_lose_nothing(exponent: int) -> None:
    """No loss scaling: gradients times 2**n have the same bits, times 2**n."""
    p, factor = make_problem(40, 32, F=32, bias=True, dtype=torch.bfloat16), 2.0**exponent
    grad = torch.randn(p.x.shape).bfloat16()
    _, small = run(p, grad * factor)
    for name, want in run(p, grad)[1].items():
        assert torch.equal(small[name], want * factor), name


def test_zero_rows() -> None:
    p = make_problem(30, 32, F=32, dtype=torch.bfloat16)
    p.x[3], p.gate_up[1], p.down[2] = 0, 0, 0
    grad = torch.randn(p.x.shape).bfloat16()
    grad[5] = 0
    y, grads = run(p, grad)
    assert y.isfinite().all()
    assert (y[3] == 0).all()
    assert all(g.isfinite().all() for g in grads.values())
    assert (grads["x"][5] == 0).all()
    assert (grads["topk_weights"][5] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_visible_and_where_they_are(bad: float) -> None:
    p = make_problem(30, 32, F=32, dtype=torch.bfloat16)
    grad = torch.randn(p.x.shape).bfloat16()
    clean, clean_grads = run(p, grad)
    others = torch.arange(30) != 7

    x = p.x.clone()
    x[7, 3] = bad
    y, _ = run(replace(p, x=x), grad)
    assert y[7].isnan().all()
    assert torch.equal(y[others], clean[others])

    bad_grad = grad.clone()
    bad_grad[7, 3] = bad
    _, grads = run(p, bad_grad)
    assert grads["x"][7].isnan().all()
    assert torch.equal(grads["x"][others], clean_grads["x"][others])

    gate_up = p.gate_up.clone()
    gate_up[2, 5, 1] = bad
    y, _ = run(replace(p, gate_up=gate_up), grad)
    users = (p.topk_ids == 2).any(1)
    assert 0 < users.sum() < 30
    assert y[users].isnan().all()
    assert torch.equal(y[~users], clean[~users])


def test_tokens_do_not_see_each_other() -> None:
    p = make_problem(64, 32, F=48, dtype=torch.bfloat16, bias=True)
    want = expert_mlp(*p.tensors(), precision="fp8")
    x = p.x * 1e4
    x[9] = p.x[9]
    assert torch.equal(expert_mlp(*replace(p, x=x).tensors(), precision="fp8")[9], want[9])


# --- what it promises beside the values ------------------------------------------------------------------------------


def test_memory_kept_for_the_backward() -> None:
    """That of the torch backend: x, H, routing, permutation, parameters; nothing in 8 bits."""
    T, D, E, K, F = 200, 32, 4, 2, 48
    p = make_problem(T, D, E, K, F, dtype=torch.bfloat16)
    R = int(products.padded_sizes(torch.bincount(p.topk_ids.flatten(), minlength=E), 2 * F * D).sum())
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        expert_mlp(*with_leaves(p)[0].tensors(), precision="fp8")
    parameters, routing, permutation = E * 3 * F * D * 2, 12 * T * K, 4 * R + 4 * T * K + 4 * E
    assert sum(storages.values()) == T * D * 2 + R * 2 * F * 2 + parameters + routing + permutation


def test_nothing_is_kept_without_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    original = fp8._expert_mlp_fp8

    def spy(*args: Any) -> Any:
        out = original(*args)
        kept.append(out[1].shape[0])
        return out

    monkeypatch.setattr(fp8, "_expert_mlp_fp8", spy)
    q, _ = with_leaves(make_problem(F=16))
    with torch.no_grad():
        expert_mlp(*q.tensors(), precision="fp8")
    assert kept == [0]


def test_autocast_and_fp32() -> None:
    """fp32 tensors are rounded to bf16 first, with and without autocast; gradients are fp32."""
    p = make_problem(40, 32, F=32, bias=True)
    rounded = {n: getattr(p, n).bfloat16() for n in DIFFERENTIABLE if n != "topk_weights" and getattr(p, n) is not None}
    grad = torch.randn(p.x.shape).bfloat16()
    want_y, want = run(replace(p, **rounded), grad)
    for autocast in (True, False):
        q, leaves = with_leaves(p)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = expert_mlp(*q.tensors(), precision="fp8")
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.backward(grad.to(y.dtype))
        assert torch.equal(y.float(), want_y.float())
        for name, leaf in leaves.items():
            assert leaf.grad.dtype == torch.float32
            assert torch.equal(leaf.grad, want[name].float()), name


def test_compiled_equals_eager() -> None:
    def call(*tensors: Tensor) -> Tensor:
        return expert_mlp(*tensors, precision="fp8")

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for tokens in (13, 20):
        p = make_problem(tokens, F=16, bias=True, dtype=torch.bfloat16)
        grad = torch.randn(p.x.shape).bfloat16()
        results = []
        for function in (call, compiled):
            q, leaves = with_leaves(p)
            y = function(*q.tensors())
            y.backward(grad)
            results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
        # Eager pads groups, which changes the order of sums in the weight gradients.
        for a, b in zip(*results, strict=True):
            assert relative_error(a, b.double()) <= 1e-2


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_operators_pass_opcheck(bias: bool) -> None:
    p = make_problem(F=16, bias=bias, dtype=torch.bfloat16)
    for save in (True, False):
        torch.library.opcheck(fp8._expert_mlp_fp8, (*p.tensors(), "silu", save, False))
    kept = fp8._expert_mlp_fp8(*p.tensors(), "silu", True, False)[1:]
    for needs in ([True] * 4 + [bias] * 2, [False, True, False, True, False, False]):
        args = (torch.randn(p.x.shape).bfloat16(), *p.tensors(), *kept, "silu", needs)
        torch.library.opcheck(fp8._expert_mlp_fp8_backward, args)


def test_frozen_tensors_and_expanded_gradient() -> None:
    p = make_problem(20, 32, F=32, dtype=torch.bfloat16)
    want = run(p, torch.ones(p.x.shape).bfloat16())[1]
    for name in ("x", "topk_weights", "gate_up", "down"):
        leaf = getattr(p, name).clone().requires_grad_()
        expert_mlp(*replace(p, **{name: leaf}).tensors(), precision="fp8").sum().backward()
        assert torch.equal(leaf.grad, want[name]), name


def test_second_derivative_is_an_error() -> None:
    q, leaves = with_leaves(make_problem(F=16, dtype=torch.bfloat16))
    y = expert_mlp(*q.tensors(), precision="fp8").float().square().sum()
    (grad,) = torch.autograd.grad(y, leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        grad.sum().backward()


def test_wrong_requests_are_named() -> None:
    good = make_problem(D=32, F=32)
    with pytest.raises(ConfigError, match="precision is 'int8': must be one of same, fp8"):
        expert_mlp(*good.tensors(), precision="int8")
    with pytest.raises(ConfigError, match="backend is 'torch': must be None"):
        expert_mlp(*good.tensors(), precision="fp8", backend="torch")
    with pytest.raises(ConfigError, match="the width of x_TD, is 24: must be a multiple of 16"):
        expert_mlp(*make_problem(D=24, F=32).tensors(), precision="fp8")
    with pytest.raises(ConfigError, match="the width of down_proj, is 8: must be a multiple of 16"):
        expert_mlp(*make_problem(D=32, F=8).tensors(), precision="fp8")
    with pytest.raises(ConfigError, match="fp64 input"):
        expert_mlp(*make_problem(D=32, F=32, dtype=torch.float64).tensors(), precision="fp8")
    with pytest.raises(ConfigError, match=r"moe.intermediate_size is 200: must be a multiple of 16"):
        MoEConfig(intermediate_size=200, precision="fp8")
    with pytest.raises(ConfigError, match=r"moe.backend is 'reference': must be none"):
        MoEConfig(backend="reference", precision="fp8")
    with pytest.raises(ConfigError, match=r"moe.precision is 'fp4': must be one of same, fp8"):
        MoEConfig(precision="fp4")  # type: ignore[arg-type]


def test_layer_takes_the_precision_from_its_config() -> None:
    config = MoEConfig(hidden_size=32, intermediate_size=32, num_experts=4)
    layer = MoE(replace(config, precision="fp8"))
    same = MoE(config)
    same.load_state_dict(layer.state_dict())
    x, target = torch.randn(64, 32), torch.randn(64, 32)
    error = relative_error(layer(x).detach(), same(x).detach().double())
    assert 0.02 < error < 0.1
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not math.isnan(losses[-1])


# --- the kernels -----------------------------------------------------------------------------------------------------


def test_kernels_in_the_interpreter() -> None:
    """In a process of its own: Triton decides on its import whether it interprets."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"}
    command = [sys.executable, str(Path(__file__).parent / "fp8_kernels_worker.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
