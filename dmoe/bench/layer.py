"""Time `expert_mlp` at a shape: its fast backends, every alternative, and a dense SwiGLU MLP of equal FLOPs.

The reference backend is a definition, not a contestant.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dmoe.bench.alternatives import ALTERNATIVES
from dmoe.bench.inputs import LAYERS, Shape, dense_weights, expert_weights, make_inputs
from dmoe.bench.limits import dense_swiglu
from dmoe.bench.measure import Clock
from dmoe.ops import BACKENDS, expert_mlp

# (D, F, E, K, T): the default model of this package, three shapes of a CPU's size, and decoding of OLMoE-1B-7B.
CPU_SHAPES = (
    Shape("tiny-moe", 128, 192, 8, 2, 2048),
    Shape("small", 256, 128, 8, 2, 2048),
    Shape("fine-grained", 512, 256, 16, 4, 1024),
    Shape("olmoe", *LAYERS["olmoe-1b-7b"], 512),
    Shape("olmoe decode 8", *LAYERS["olmoe-1b-7b"], 8),
    Shape("olmoe decode 1", *LAYERS["olmoe-1b-7b"], 1),
)
GPU_SHAPES = (
    Shape("olmoe", *LAYERS["olmoe-1b-7b"], 16384),
    Shape("qwen3-30b-a3b", *LAYERS["qwen3-30b-a3b"], 16384),
    Shape("mixtral", *LAYERS["mixtral-8x7b"], 8192),
)


def fast_backends(device: torch.device) -> list[str]:
    """Backends to time: not the reference, and Triton's only where it is compiled."""
    return [name for name in BACKENDS if name != "reference" and (name != "triton" or device.type == "cuda")]


def _dense(x: Tensor, _ids: Tensor, _weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return dense_swiglu(x, gate_up, down)


def _step(function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor) -> None:
    leaves = [t for t in inputs if t.requires_grad]
    torch.autograd.grad(function(*inputs), leaves, grad, allow_unused=True)


def time_shape(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, rounds: int = 7, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Median seconds of "forward" (no gradient) and "forward_backward" per implementation.

    Every round has new inputs and runs all implementations, so that a slow moment of the machine falls on all of them.
    Names: "dense", the backends as "dmoe (NAME)", and the alternatives. One warm-up round is not counted.
    """
    torch.manual_seed(seed)
    clock = Clock(device)
    experts, dense = expert_weights(shape, dtype, device), dense_weights(shape, dtype, device)
    functions: dict[str, Callable[..., Tensor]] = {"dense": _dense}
    functions |= {f"dmoe ({name})": partial(expert_mlp, backend=name) for name in fast_backends(device)}
    functions |= ALTERNATIVES
    times: dict[str, dict[str, list[float]]] = {name: {"forward": [], "forward_backward": []} for name in functions}
    order = random.Random(seed)
    for round_number in range(rounds + 1):
        *tokens, grad = make_inputs(shape, "uniform", dtype, device)
        # In random order: what one leaves behind in the allocator is what the next one finds.
        for name, function in order.sample([*functions.items()], len(functions)):
            inputs = [*tokens, *(dense if name == "dense" else experts)]
            with torch.no_grad():
                forward = clock.seconds(partial(function, *inputs))
            both = clock.seconds(partial(_step, function, inputs, grad))
            if round_number:
                times[name]["forward"].append(forward)
                times[name]["forward_backward"].append(both)
    return {name: {kind: statistics.median(values) for kind, values in kinds.items()} for name, kinds in times.items()}
