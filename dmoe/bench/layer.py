"""Time `expert_mlp` at a shape: its fast backends, every alternative, and a dense SwiGLU MLP of equal FLOPs.

The reference backend is a definition, not a contestant.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.bench.alternatives import ALTERNATIVES
from dmoe.ops import BACKENDS, expert_mlp


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


# (D, F, E, K, T): the default model of this package, three shapes of a CPU's size, and decoding of OLMoE-1B-7B.
CPU_SHAPES = (
    Shape("tiny-moe", 128, 192, 8, 2, 2048),
    Shape("small", 256, 128, 8, 2, 2048),
    Shape("fine-grained", 512, 256, 16, 4, 1024),
    Shape("olmoe", 2048, 1024, 64, 8, 512),
    Shape("olmoe decode 8", 2048, 1024, 64, 8, 8),
    Shape("olmoe decode 1", 2048, 1024, 64, 8, 1),
)
GPU_SHAPES = (
    Shape("olmoe", 2048, 1024, 64, 8, 16384),
    Shape("qwen3-30b-a3b", 2048, 768, 128, 8, 16384),
    Shape("mixtral", 4096, 14336, 8, 2, 8192),
)


def _dense(x: Tensor, _ids: Tensor, _weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def _weights(shape: Shape, width: int, dtype: torch.dtype, device: torch.device, experts: int = 0) -> list[Tensor]:
    """gate_up and down of experts, or without `experts` of one dense MLP of that width."""
    D, E = shape.hidden_size, (experts,) if experts else ()
    gate_up, down = torch.randn(*E, 2 * width, D, device=device), torch.randn(*E, D, width, device=device)
    return [(w * w.shape[-1] ** -0.5).to(dtype).requires_grad_() for w in (gate_up, down)]


def _tokens(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """x, expert ids and routing weights. New ones for every round: no two batches of a training run are alike."""
    x = torch.randn(shape.tokens, shape.hidden_size, device=device).to(dtype).requires_grad_()
    weights, ids = torch.randn(shape.tokens, shape.num_experts, device=device).softmax(dim=-1).topk(shape.top_k, dim=-1)
    return [x, ids, weights.requires_grad_()]


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _step(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    leaves = [t for t in inputs if t.requires_grad]
    torch.autograd.grad(function(*inputs), leaves, grad, allow_unused=True)


def time_shape(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, rounds: int = 7, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Median seconds of "forward" (no gradient) and "forward_backward" per implementation.

    Every round runs all implementations, so that a slow moment of the machine falls on all of them.
    Names: "dense", the backends as "dmoe (NAME)", and the alternatives. One warm-up round is not counted.
    """
    torch.manual_seed(seed)
    experts = _weights(shape, shape.intermediate_size, dtype, device, shape.num_experts)
    dense = _weights(shape, shape.top_k * shape.intermediate_size, dtype, device)
    functions: dict[str, Callable[..., Tensor]] = {"dense": _dense}
    functions |= {f"dmoe ({name})": partial(expert_mlp, backend=name) for name in BACKENDS if name != "reference"}
    functions |= ALTERNATIVES
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "forward_backward": []} for name in functions}
    order = random.Random(seed)
    for round_number in range(rounds + 1):
        tokens = _tokens(shape, dtype, device)
        grad = torch.randn_like(tokens[0])
        # In random order: what one leaves behind in the allocator is what the next one finds.
        for name, function in order.sample([*functions.items()], len(functions)):
            inputs = [*tokens, *(dense if name == "dense" else experts)]
            with torch.no_grad():
                forward = _seconds(partial(function, *inputs), device)
            both = _seconds(partial(_step, function, inputs, grad), device)
            if round_number:
                times[name]["forward"].append(forward)
                times[name]["forward_backward"].append(both)
    return {name: {kind: statistics.median(values) for kind, values in kinds.items()} for name, kinds in times.items()}
