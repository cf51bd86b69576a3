"""How far an implementation's output and gradients are from the same computation in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.bench.contest import Contestant
from dmoe.bench.inputs import Inputs

NAMES = ("output", "grad_x", "grad_weights", "grad_gate_up", "grad_down")


class _ExpertPart(NamedTuple):
    """What one expert gives: its rows' tokens and picks, their outputs and gradients, and those of its weights."""

    tokens_R: Tensor
    picks_R: Tensor
    y_RD: Tensor
    grad_x_RD: Tensor
    grad_weights_R: Tensor
    grad_gate_up: Tensor
    grad_down: Tensor


def _experts_in_fp64(inputs: Inputs, gate_up: Tensor, down: Tensor) -> Iterator[_ExpertPart]:
    """The definition, an expert at a time: all weights of a large layer and their gradients do not fit in fp64."""
    for expert in range(gate_up.shape[0]):
        tokens_R, picks_R = torch.where(inputs.ids_TK == expert)
        x_RD = inputs.x_TD.detach()[tokens_R].double().requires_grad_()
        weights_R = inputs.weights_TK.detach()[tokens_R, picks_R].double().requires_grad_()
        up_e, down_e = (w[expert].detach().double().requires_grad_() for w in (gate_up, down))
        gate_RF, up_RF = (x_RD @ up_e.T).chunk(2, dim=-1)
        y_RD = (F.silu(gate_RF) * up_RF) @ down_e.T * weights_R.unsqueeze(1)
        gradients = torch.autograd.grad(
            y_RD, [x_RD, weights_R, up_e, down_e], inputs.grad_TD[tokens_R].double(), materialize_grads=True
        )
        yield _ExpertPart(tokens_R, picks_R, y_RD.detach(), *gradients)


def relative_errors(contestant: Contestant, inputs: Inputs, gate_up: Tensor, down: Tensor) -> dict[str, float]:
    """|got - exact| / |exact| over all elements (Frobenius norms), by `NAMES`.

    The exact values are those of the bf16 inputs and weights as they are, in fp64: what is left is the rounding of the
    implementation itself.
    """
    output = contestant.call(*inputs[:3])
    leaves = [inputs.x_TD, inputs.weights_TK, *contestant.leaves]
    grad_x, grad_weights, *gradients = torch.autograd.grad(output, leaves, inputs.grad_TD)
    got_gate_up, got_down = contestant.weight_gradients(gradients)

    exact = [torch.zeros_like(t, dtype=torch.float64) for t in (inputs.x_TD, inputs.x_TD, inputs.weights_TK)]
    squares = torch.zeros(2, 2, dtype=torch.float64, device=gate_up.device)  # (difference, exact) of both weights
    for expert, part in enumerate(_experts_in_fp64(inputs, gate_up, down)):
        exact[0].index_add_(0, part.tokens_R, part.y_RD)
        exact[1].index_add_(0, part.tokens_R, part.grad_x_RD)
        exact[2][part.tokens_R, part.picks_R] = part.grad_weights_R
        for row, (got, right) in enumerate(((got_gate_up, part.grad_gate_up), (got_down, part.grad_down))):
            squares[row] += torch.stack([(got[expert].double() - right).square().sum(), right.square().sum()])
    errors = [
        float((got.detach().double() - right).norm() / right.norm())
        for got, right in zip((output, grad_x, grad_weights), exact)
    ]
    errors += [float((difference / right).sqrt()) for difference, right in squares]
    return dict(zip(NAMES, errors))
