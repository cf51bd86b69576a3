"""GELU in its tanh form, and its derivative in place. Tensors, or the values of an `stk.Matrix`.

gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))): Hendrycks and Gimpel, arXiv:1606.08415, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.compat.megablocks.layers.matrix import map_values, values


def gelu(x: Any) -> Any:
    """Tanh-form GELU of `x`, in its dtype. Differentiable."""
    return map_values(x, lambda data: F.gelu(data, approximate="tanh"))


def gelu_backward_(grad: Any, x: Any) -> Any:
    """Overwrite `grad` with grad * gelu'(x) and return it.

    The derivative is torch's own, so equal to that of autograd. MegaBlocks rounds after every step of the formula in
    the dtype of `x`, which in bf16 is off by up to 1e-2 of the largest value.
    """

    def backward_(grad_data: Tensor) -> Tensor:
        return grad_data.copy_(torch.ops.aten.gelu_backward(grad_data, values(x), approximate="tanh"))

    return map_values(grad, backward_)
