"""What the expert computation is timed on: shapes, weights, tokens and three ways to route them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ROUTINGS = ("uniform", "skewed", "one")


@dataclass(frozen=True)
class Shape:
    """One mixture-of-experts layer and a number of tokens."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    tokens: int

    def forward_flops(self) -> float:
        """6 * T * K * D * F: three products of 2 FLOPs, gate, up and down."""
        return 6.0 * self.tokens * self.top_k * self.hidden_size * self.intermediate_size

    def flops(self, kind: str) -> float:
        """FLOPs of "forward" or "forward_backward": the backward has two products for each of the forward."""
        return self.forward_flops() * {"forward": 1, "forward_backward": 3}[kind]


# D, F, E, K of published models; of DeepSeek-V3 the 64 experts that one of four devices would hold.
LAYERS = {
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "olmoe-1b-7b": (2048, 1024, 64, 8),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
    "deepseek-v3": (7168, 2048, 64, 8),
}


class Inputs(NamedTuple):
    """One batch: what a layer gets, and the gradient of its output."""

    x_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    grad_TD: Tensor


def expert_weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """gate_up_proj [E, 2F, D] and down_proj [E, D, F], normal, of a size that keeps the activations near 1."""
    D, F_, E = shape.hidden_size, shape.intermediate_size, shape.num_experts
    return _normal((E, 2 * F_, D), dtype, device), _normal((E, D, F_), dtype, device)


def dense_weights(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """gate_up [2KF, D] and down [D, KF] of a dense MLP that costs a token as many FLOPs."""
    D, width = shape.hidden_size, shape.top_k * shape.intermediate_size
    return _normal((2 * width, D), dtype, device), _normal((D, width), dtype, device)


def _normal(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # In the dtype from the start: a fp32 copy of a large layer's weights would be 10 GiB in between.
    return (torch.randn(sizes, dtype=dtype, device=device).mul_(sizes[-1] ** -0.5)).requires_grad_()


def make_inputs(shape: Shape, routing: str, dtype: torch.dtype, device: torch.device) -> Inputs:
    """New tokens, expert ids, routing weights and an output gradient, none of them zero.

    Args:
        routing: "uniform": the top K of a softmax of normal logits. "skewed": K experts without replacement, expert
            number i with a probability that goes like 1 / (i + 1) (Zipf's law). "one": the first K experts, always.
    """
    tokens, num_experts = shape.tokens, shape.num_experts
    logits = torch.randn(tokens, num_experts, device=device)
    if routing == "skewed":
        # The top K of log p + Gumbel noise are K draws without replacement (the Gumbel top-k trick).
        logits = torch.distributions.Gumbel(logits.new_zeros(()), logits.new_ones(())).sample(logits.shape)
        logits = logits - torch.arange(1, num_experts + 1, device=device).log()
    elif routing == "one":
        logits[:, : shape.top_k] += 1e3
    weights, ids = logits.topk(shape.top_k, dim=-1)
    x = torch.randn(tokens, shape.hidden_size, dtype=dtype, device=device)
    return Inputs(
        x.requires_grad_(), ids, F.softmax(weights, dim=-1).requires_grad_(), torch.randn_like(x, requires_grad=False)
    )
