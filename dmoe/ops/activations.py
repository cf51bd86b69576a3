"""Expert activations, forward and backward, as plain tensor expressions.

Legend: R rows, F expert width, H = 2F for gated experts (columns: gate then up) and F otherwise. The maths runs in
fp32 for half-precision inputs (fp64 for fp64), because the routing weight is multiplied in before the one rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# gpt-oss: https://github.com/openai/gpt-oss, `swiglu` of its reference model.
CLAMP_LIMIT = 7.0
CLAMP_ALPHA = 1.702


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _pointwise(name: str, x: Tensor) -> Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "relu":
        return F.relu(x)
    if name == "relu2":
        return F.relu(x).square()
    raise ValueError(f"unknown activation {name!r}")


def _pointwise_backward(name: str, grad: Tensor, x: Tensor) -> Tensor:
    if name == "silu":
        return torch.ops.aten.silu_backward(grad, x)
    if name == "gelu":
        return torch.ops.aten.gelu_backward(grad, x)
    if name == "gelu_tanh":
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
    if name == "relu":
        return grad * (x > 0)
    if name == "relu2":
        return grad * (2 * F.relu(x))
    raise ValueError(f"unknown activation {name!r}")


def activate(h_RH: Tensor, name: str, *, gated: bool) -> Tensor:
    """Expert activation of the pre-activation `h_RH`.

    Gated: act(gate) * up, with h = [gate | up] (Shazeer, "GLU Variants Improve Transformer", arXiv:2002.05202);
    "clamped_swiglu": (up + 1) * gate * sigmoid(1.702 * gate), gate clamped to at most 7 and up to [-7, 7] (gpt-oss).

    Returns:
        [R, F] in fp32, or fp64 for an fp64 input. Differentiable.
    """
    h = _wide(h_RH)
    if not gated:
        return _pointwise(name, h)
    gate, up = h.chunk(2, dim=-1)
    if name == "clamped_swiglu":
        gate, up = gate.clamp(max=CLAMP_LIMIT), up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT)
        return gate * torch.sigmoid(CLAMP_ALPHA * gate) * (up + 1)
    return _pointwise(name, gate) * up


def activate_backward(grad_RF: Tensor, h_RH: Tensor, name: str, *, gated: bool, out: Tensor) -> Tensor:
    """Recompute the activation and take its derivative.

    Args:
        grad_RF: gradient of the activation, wide (fp32 or fp64).
        h_RH: the saved pre-activation, any dtype.
        out: [R, H], receives d loss / d h in its own dtype.

    Returns:
        The activation [R, F], wide.
    """
    h = _wide(h_RH)
    if not gated:
        out.copy_(_pointwise_backward(name, grad_RF, h))
        return _pointwise(name, h)
    gate, up = h.chunk(2, dim=-1)
    grad_gate, grad_up = out.chunk(2, dim=-1)
    if name == "clamped_swiglu":
        gate_c, up_c = gate.clamp(max=CLAMP_LIMIT), up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT)
        sig = torch.sigmoid(CLAMP_ALPHA * gate_c)
        act = gate_c * sig
        grad_act = grad_RF * (up_c + 1) * (sig + CLAMP_ALPHA * act * (1 - sig))
        grad_gate.copy_(grad_act * (gate <= CLAMP_LIMIT))
        grad_up.copy_(grad_RF * act * (up.abs() <= CLAMP_LIMIT))
        return act * (up_c + 1)
    act = _pointwise(name, gate)
    torch.mul(grad_RF, act, out=grad_up)
    grad_gate.copy_(_pointwise_backward(name, grad_RF * up, gate))
    return act.mul_(up)
