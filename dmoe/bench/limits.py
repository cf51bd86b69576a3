"""What the expert computation is compared with from above: less work than it must do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.bench.inputs import Shape


def dense_swiglu(x_TD: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A dense SwiGLU MLP, eager: gate_up [2W, D], down [D, W]."""
    gate, up = F.linear(x_TD, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class BalancedProducts:
    """The matrix products of a layer and nothing else, for perfectly balanced experts: `torch.bmm` into given outputs.

    No sorting, no gathering, no activation, no combination. The forward has two calls (gate and up in one) of three
    products' worth, the backward four of six. The buffers hold random numbers or results of them: a product of zeros
    draws less power and runs at a higher clock.
    """

    def __init__(self, shape: Shape, gate_up: Tensor, down: Tensor) -> None:
        """For these weights, [E, 2F, D] and [E, D, F]; E must divide T * K."""
        num_experts, width, hidden = gate_up.shape
        rows = shape.tokens * shape.top_k // num_experts
        if rows * num_experts != shape.tokens * shape.top_k:
            raise ValueError(f"{shape.tokens * shape.top_k} rows do not divide into {num_experts} equal experts")
        self._gate_up, self._down = gate_up.detach(), down.detach()
        kind: dict[str, Any] = {"dtype": gate_up.dtype, "device": gate_up.device}
        self._x = torch.randn(num_experts, rows, hidden, **kind)
        self._activation = torch.randn(num_experts, rows, width // 2, **kind)
        self._h = torch.empty(num_experts, rows, width, **kind)
        self._y = torch.empty_like(self._x)
        self._grad_activation = torch.empty_like(self._activation)
        self._grad_gate_up: Tensor | None = None
        self._grad_down: Tensor | None = None

    def forward(self) -> None:
        """x W1^T and a W2^T."""
        torch.bmm(self._x, self._gate_up.transpose(1, 2), out=self._h)
        torch.bmm(self._activation, self._down.transpose(1, 2), out=self._y)

    def forward_backward(self) -> None:
        """Then, with what the forward wrote in the place of the gradients dy and dh: dy W2, dy^T a, dh W1, dh^T x."""
        if self._grad_gate_up is None or self._grad_down is None:
            self._grad_gate_up, self._grad_down = torch.empty_like(self._gate_up), torch.empty_like(self._down)
        self.forward()
        torch.bmm(self._y, self._down, out=self._grad_activation)
        torch.bmm(self._y.transpose(1, 2), self._activation, out=self._grad_down)
        torch.bmm(self._h, self._gate_up, out=self._y)  # dx: dy has been used
        torch.bmm(self._h.transpose(1, 2), self._x, out=self._grad_gate_up)
