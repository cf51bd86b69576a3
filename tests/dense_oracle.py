"""The mixture of experts written down a second time, independently of the package: the oracle of the tests.

Every expert computes every token in fp64, and a [T, E] matrix that holds the routing weights (0 where an expert was
not chosen) masks and sums the results. No sorting, no grouping, no hand-written gradient.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")
DIFFERENTIABLE = ("x", "topk_weights", "gate_up", "down", "gate_up_bias", "down_bias")


def pointwise(name: str, x: Tensor) -> Tensor:
    """The activation functions from their definitions."""
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "relu":
        return torch.where(x > 0, x, torch.zeros_like(x))
    if name == "relu2":
        return torch.where(x > 0, x * x, torch.zeros_like(x))
    raise AssertionError(name)


def activation(name: str, h: Tensor, gated: bool) -> Tensor:
    """[..., H] -> [..., F]; gated columns are gate, then up."""
    if not gated:
        return pointwise(name, h)
    width = h.shape[-1] // 2
    gate, up = h[..., :width], h[..., width:]
    if name == "clamped_swiglu":
        gate = torch.where(gate > 7, torch.full_like(gate, 7.0), gate)
        up = torch.where(up > 7, torch.full_like(up, 7.0), torch.where(up < -7, torch.full_like(up, -7.0), up))
        return (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
    return pointwise(name, gate) * up


@dataclass
class Problem:
    """Arguments of `expert_mlp`. `topk_ids` is [T, K] and the biases may be None."""

    x: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: str = "silu"

    def tensors(self) -> tuple[Tensor | None, ...]:
        """In the order of `expert_mlp`'s parameters."""
        return (
            self.x, self.topk_ids, self.topk_weights, self.gate_up, self.down, self.gate_up_bias, self.down_bias
        )  # fmt: skip


def make_problem(
    T: int = 13, D: int = 16, E: int = 4, K: int = 2, F: int = 8, *, gated: bool = True, bias: bool = False,
    activation: str = "silu", dtype: torch.dtype = torch.float32, only_experts: list[int] | None = None,
    h_scale: float = 1.0,
) -> Problem:  # fmt: skip
    """Random arguments with values of order 1. `only_experts`: the ids that tokens may choose from."""
    pool = torch.tensor(only_experts if only_experts is not None else range(E))
    ids = [pool[torch.randperm(len(pool))[:K]] for _ in range(T)]
    width = 2 * F if gated else F
    return Problem(
        x=torch.randn(T, D).to(dtype),
        topk_ids=torch.stack(ids) if T else torch.empty(0, K, dtype=torch.int64),
        topk_weights=torch.rand(T, K) + 0.1,
        gate_up=(torch.randn(E, width, D) * h_scale / math.sqrt(D)).to(dtype),
        down=(torch.randn(E, D, F) / math.sqrt(F)).to(dtype),
        gate_up_bias=torch.randn(E, width).to(dtype) if bias else None,
        down_bias=torch.randn(E, D).to(dtype) if bias else None,
        activation=activation,
    )


def dense_moe(p: Problem) -> Tensor:
    """y [T, D] in fp64, differentiable."""
    num_experts, num_rows, _ = p.gate_up.shape
    weights_TE = torch.zeros(len(p.x), num_experts, dtype=torch.float64)
    weights_TE = weights_TE.scatter(1, p.topk_ids.long(), p.topk_weights.double())
    h = torch.einsum("td,ehd->teh", p.x.double(), p.gate_up.double())
    if p.gate_up_bias is not None:
        h = h + p.gate_up_bias.double()
    y = torch.einsum("tef,edf->ted", activation(p.activation, h, num_rows == 2 * p.down.shape[2]), p.down.double())
    if p.down_bias is not None:
        y = y + p.down_bias.double()
    return torch.einsum("te,ted->td", weights_TE, y)


def dense_gradients(p: Problem, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle's output and its gradients by name, all in fp64."""
    leaves = {n: getattr(p, n).detach().double().requires_grad_() for n in DIFFERENTIABLE if getattr(p, n) is not None}
    y = dense_moe(Problem(**{**vars(p), **leaves}))
    y.backward(grad.double())
    return y.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the 2-norm; where `want` is all zero, |got|."""
    assert got.shape == want.shape
    distance, size = (got.double() - want.double()).norm().item(), want.double().norm().item()
    return distance / size if size else got.double().norm().item()
