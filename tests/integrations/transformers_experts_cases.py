"""Experts modules with every combination of transformers' flags, and what they compute as a formula in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, WIDTH = 16, 24


class Case(NamedTuple):
    gate: str = "silu"
    """An activation by name, or one of our own below."""
    is_transposed: bool = False
    interleaved: bool = False
    has_bias: bool = False
    has_gate: bool = True
    norm: bool = False
    num_experts: int = 5
    width: int = WIDTH


CASES = {
    "plain layout": Case(),
    "transposed": Case("gelu", is_transposed=True),
    "interleaved": Case("relu", interleaved=True, has_bias=True),
    "gpt-oss": Case("clamped_swiglu", is_transposed=True, interleaved=True, has_bias=True),
    "clamped, concatenated": Case("clamped_swiglu", has_bias=True),
    "no gate": Case("relu2", has_gate=False),
    "no gate, transposed, bias": Case("gelu_tanh", has_gate=False, is_transposed=True, has_bias=True),
    "own gate": Case("own"),
    "own gate, transposed, interleaved, bias": Case("own", is_transposed=True, interleaved=True, has_bias=True),
    "other activation, no gate, bias": Case("quick_gelu", has_gate=False, has_bias=True),
    "norm": Case(norm=True),
    "norm, bias": Case(norm=True, has_bias=True, is_transposed=True),
    "one expert": Case(num_experts=1),
    "one expert, own gate": Case("own", num_experts=1, has_bias=True),
    "odd widths, own gate": Case("own", width=21),
    "odd widths, own gate, transposed": Case("own", width=21, is_transposed=True),
}
OURS = {name for name, case in CASES.items() if case.gate not in ("own", "quick_gelu") and not case.norm}


def act(name: str, x: Tensor) -> Tensor:
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if name == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.relu(x).square() if name == "relu2" else getattr(F, name)(x)


def gated(name: str, gate: Tensor, up: Tensor) -> Tensor:
    if name == "own":
        return F.silu(gate.clamp(max=0.5)) * up.clamp(-0.5, 0.5)
    if name == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return act(name, gate) * up


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def build(case: Case, dtype: torch.dtype = torch.float32, implementation: str = "dmoe") -> Any:
    """An experts module by transformers' own decorator."""
    from transformers.integrations.moe import use_experts_implementation

    class TinyExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            E, wide = case.num_experts, case.width * (2 if case.has_gate else 1)
            up, down = ((E, D, wide), (E, case.width, D)) if case.is_transposed else ((E, wide, D), (E, D, case.width))
            name = "gate_up_proj" if case.has_gate else "up_proj"
            self.num_experts = E
            self.register_parameter(name, nn.Parameter(torch.randn(up) * D**-0.5 * 2))
            self.down_proj = nn.Parameter(torch.randn(down) * case.width**-0.5)
            if case.has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(E, wide)))
                self.down_proj_bias = nn.Parameter(torch.randn(E, D))
            if case.norm:
                self.post_expert_norm = RMSNorm(D)

        def act_fn(self, x: Tensor) -> Tensor:
            return act(case.gate, x)

        def forward(self, *_: Any) -> Tensor:
            raise AssertionError("transformers' own path")

    if case.interleaved or case.gate in ("own", "clamped_swiglu"):

        def apply_gate(self: Any, h: Tensor) -> Tensor:
            return gated(case.gate, *((h[..., ::2], h[..., 1::2]) if case.interleaved else h.chunk(2, dim=-1)))

        TinyExperts._apply_gate = apply_gate  # type: ignore[attr-defined]
    flags: dict[str, Any] = {"is_transposed": case.is_transposed, "has_bias": case.has_bias, "has_gate": case.has_gate}
    experts = use_experts_implementation(TinyExperts, is_concatenated=not case.interleaved, **flags)
    module: Any = experts(SimpleNamespace(_experts_implementation=implementation)).to(dtype)
    module.has_post_expert_norm = case.norm  # which 5.17 does not know
    return module


def expected(module: Any, case: Case, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Token by token and pick by pick, in the dtype of the module; E is no expert."""
    name = "gate_up_proj" if case.has_gate else "up_proj"
    rows = []
    for t, ids in enumerate(ids_TK.tolist()):
        row = torch.zeros(D, dtype=module.down_proj.dtype)
        for k, e in enumerate(ids):
            if e >= case.num_experts:
                continue
            up, down = getattr(module, name)[e], module.down_proj[e]
            up, down = (up, down) if case.is_transposed else (up.t(), down.t())
            h = x_TD[t] @ up + (getattr(module, f"{name}_bias")[e] if case.has_bias else 0)
            halves = (h[::2], h[1::2]) if case.interleaved else h.tensor_split(2)
            y = (gated(case.gate, *halves) if case.has_gate else act(case.gate, h)) @ down
            y = y + (module.down_proj_bias[e] if case.has_bias else 0)
            row = row + weights_TK[t, k] * (module.post_expert_norm(y) if case.norm else y)
        rows.append(row)
    return torch.stack(rows) if rows else x_TD.new_zeros(0, D)


def routing(num_tokens: int, top_k: int, num_experts: int, used: int | None = None) -> tuple[Tensor, Tensor]:
    """Distinct ids of the first `used` experts, and weights."""
    used = used or num_experts
    ids = torch.rand(num_tokens, used).argsort(dim=1)[:, :top_k]
    return ids, torch.rand(num_tokens, top_k) + 0.1
