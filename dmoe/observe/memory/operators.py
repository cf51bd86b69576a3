"""Operators of this library that are looked into when memory is accounted for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dmoe.ops import grouped


def operators_to_look_into(device: torch.device) -> dict[Any, Callable[..., Any]]:
    """Operator -> its body, for `MemoryTimeline`: what the experts allocate besides their results."""
    bodies = {
        torch.ops.dmoe.expert_mlp.default: grouped._expert_mlp._init_fn,
        torch.ops.dmoe.expert_mlp_backward.default: grouped._expert_mlp_backward._init_fn,
    }
    if device.type == "cuda" and hasattr(torch.ops.dmoe, "expert_mlp_triton"):  # once it has run
        from dmoe.ops import triton_experts

        bodies[torch.ops.dmoe.expert_mlp_triton.default] = triton_experts._expert_mlp._init_fn
        bodies[torch.ops.dmoe.expert_mlp_triton_backward.default] = triton_experts._expert_mlp_backward._init_fn
    return bodies
