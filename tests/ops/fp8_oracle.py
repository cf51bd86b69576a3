"""An independent model of precision="fp8": the rounding in fp64 numpy, the recipe in fp64 expert by expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from dense_oracle import DIFFERENTIABLE, Problem, activation
from torch import Tensor


def round_rows(rows: np.ndarray) -> np.ndarray:
    """Rows over the last dim, to 4 significant bits of e4m3 with a power-of-two scale. NaN rows where not finite."""
    amax = np.abs(rows).max(-1, keepdims=True)
    ok = np.isfinite(amax)
    scale = 2.0 ** np.ceil(np.log2(np.maximum(np.where(ok, amax, 1.0), 2.0**-118) / 448))
    scaled = np.where(ok, rows, 0) / scale
    exponent = np.floor(np.log2(np.maximum(np.abs(scaled), 2.0**-6)))  # below 2**-6 numbers are 2**-9 apart
    step = 2.0 ** (exponent - 3)
    return np.where(ok, np.rint(scaled / step) * step * scale, np.nan)


def Q(t: Tensor) -> Tensor:
    return torch.from_numpy(round_rows(t.numpy()))


def bf16(t: Tensor) -> Tensor:
    return t.bfloat16().double()


class Product8(torch.autograd.Function):
    """x w^T of rounded operands; the gradient of x with rounded operands, that of w without."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return bf16(Q(x) @ Q(w).T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return bf16(Q(bf16(grad)) @ Q(w.T.contiguous()).T), grad.T @ x


def oracle(p: Problem, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients in fp64, expert by expert, from the recipe's definition."""
    leaves = {n: getattr(p, n).detach().double().requires_grad_() for n in DIFFERENTIABLE if getattr(p, n) is not None}
    q = Problem(**{**vars(p), **leaves})
    y = torch.zeros(p.x.shape, dtype=torch.float64) + 0 * sum(leaf.sum() for leaf in leaves.values())
    for e in range(len(q.down)):
        t, k = torch.where(p.topk_ids == e)
        if len(t) == 0:
            continue
        h = Product8.apply(q.x[t], q.gate_up[e])
        h = h if q.gate_up_bias is None else h + q.gate_up_bias[e]
        h = h + (bf16(h.detach()) - h.detach())
        s = q.topk_weights[t, k, None]
        rows = Product8.apply(s * activation(p.activation, h, q.gate_up.shape[1] == 2 * q.down.shape[2]), q.down[e])
        rows = rows if q.down_bias is None else rows + s * q.down_bias[e]
        y = y.index_add(0, t, rows)
    (y * grad.double()).sum().backward()
    return y.detach(), {n: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for n, leaf in leaves.items()}
