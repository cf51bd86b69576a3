"""Expert activations and their hand-written derivatives against autograd of the definitions in fp64."""

import pytest
import torch
from dense_oracle import ACTIVATIONS, activation, relative_error

from dmoe.ops.activations import activate, activate_backward

CASES = [(name, gated) for name in ACTIVATIONS for gated in (True, False) if gated or name != "clamped_swiglu"]


@pytest.mark.parametrize(("name", "gated"), CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_forward_and_backward(name: str, gated: bool, dtype: torch.dtype) -> None:
    h = (torch.randn(64, 10) * 5).to(dtype)
    grad = torch.randn(64, 5 if gated else 10, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    leaf = h.double().requires_grad_()
    want = activation(name, leaf, gated)
    want.backward(grad.double())

    out = torch.full_like(h, float("nan"))
    with torch.no_grad():
        recomputed = activate_backward(grad, h, name, gated=gated, out=out)
    forward = activate(h, name, gated=gated)
    assert forward.dtype == grad.dtype  # wide: not rounded to bf16
    assert relative_error(forward, want.detach()) <= (1e-14 if dtype == torch.float64 else 1e-6)
    assert torch.equal(forward, recomputed)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(out, leaf.grad) <= tolerance


@pytest.mark.parametrize(("name", "gated"), CASES)
def test_backward_equals_autograd_of_activate(name: str, gated: bool) -> None:
    """Including the points where a derivative jumps: 0 of relu, and the two clamps of gpt-oss."""
    edges = torch.tensor([-100.0, -7.5, -7.0, -1.0, 0.0, 1.0, 7.0, 7.5, 100.0], dtype=torch.float64)
    h = torch.cartesian_prod(edges, edges).requires_grad_()
    y = activate(h, name, gated=gated)
    grad = torch.randn_like(y)
    y.backward(grad)
    out = torch.empty_like(h)
    with torch.no_grad():
        activate_backward(grad, h, name, gated=gated, out=out)
    torch.testing.assert_close(out, h.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("name", "gated"), CASES)
def test_zero_maps_to_zero(name: str, gated: bool) -> None:
    """What the zero padding of unaligned widths relies on."""
    assert torch.equal(activate(torch.zeros(1, 2), name, gated=gated), torch.zeros(1, 1 if gated else 2))
