"""Expert activations inside a kernel, forward and derivative; the same functions as `dmoe.ops.activations`.

All arguments and results are fp32 tiles. `ACT` is the name of the activation, a compile-time constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dmoe.ops.kernels.hardware import sigmoid

CLAMP_LIMIT = tl.constexpr(7.0)
CLAMP_ALPHA = tl.constexpr(1.702)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
_TANH_SCALE = tl.constexpr(0.7978845608028654)
_TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def pointwise(x, ACT: tl.constexpr):
    """act(x)."""
    if ACT == "silu":
        return x * sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    elif ACT == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2 z) - 1
        return x * sigmoid((x + x * x * x * _TANH_CUBIC) * (2.0 * _TANH_SCALE))
    elif ACT == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        tl.static_assert(ACT == "relu2", "unknown activation")
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return y * y


@triton.jit
def pointwise_with_derivative(x, ACT: tl.constexpr):
    """(act(x), act'(x))."""
    if ACT == "silu":
        s = sigmoid(x)
        y = x * s
        return y, s + y * (1.0 - s)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF))
        return x * cdf, cdf + x * tl.exp(x * x * -0.5) * _INV_SQRT_2PI
    elif ACT == "gelu_tanh":
        s = sigmoid((x + x * x * x * _TANH_CUBIC) * (2.0 * _TANH_SCALE))
        slope = (1.0 + x * x * (3.0 * _TANH_CUBIC)) * (2.0 * _TANH_SCALE)
        return x * s, s + x * s * (1.0 - s) * slope
    elif ACT == "relu":
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return y, tl.where(x > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACT == "relu2", "unknown activation")
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return y * y, 2.0 * y


@triton.jit
def gated(gate, up, ACT: tl.constexpr):
    """act(gate) * up, or the clamped form of gpt-oss."""
    if ACT == "clamped_swiglu":
        gate = tl.minimum(gate, CLAMP_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -CLAMP_LIMIT, CLAMP_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        return gate * sigmoid(gate * CLAMP_ALPHA) * (up + 1.0)
    else:
        return pointwise(gate, ACT) * up


@triton.jit
def gated_with_derivative(gate, up, grad, ACT: tl.constexpr):
    """(activation, gradient of gate, gradient of up) for the gradient `grad` of the activation."""
    if ACT == "clamped_swiglu":
        gate_c = tl.minimum(gate, CLAMP_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up_c = tl.clamp(up, -CLAMP_LIMIT, CLAMP_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        s = sigmoid(gate_c * CLAMP_ALPHA)
        act = gate_c * s
        grad_gate = grad * (up_c + 1.0) * (s + act * (1.0 - s) * CLAMP_ALPHA)
        grad_gate = tl.where(gate <= CLAMP_LIMIT, grad_gate, 0.0)
        grad_up = tl.where(tl.abs(up) <= CLAMP_LIMIT, grad * act, 0.0)
        return act * (up_c + 1.0), grad_gate, grad_up
    else:
        act, slope = pointwise_with_derivative(gate, ACT)
        return act * up, grad * up * slope, grad * act
