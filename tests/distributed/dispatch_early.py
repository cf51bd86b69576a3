"""Gradients of tokens that travel back while those of the experts' weights are computed: backend "triton" alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from dispatch_cases import Case, actual
from dispatch_worker import check
from exchange_worker import logged
from torch import Tensor

from dmoe.ops import triton_experts


def gradients_travel_while_weights_are_computed(group: dist.ProcessGroup, device: str, dtype: torch.dtype) -> None:
    """The last messages of a backward start before the gradients of the weights and are waited for after them; with
    routing weights that the experts cast, as ever. Every message is waited for."""
    tokens, tolerance = [50, 0, 30, 4][: group.size()], 0.03 if dtype == torch.bfloat16 else 1e-5
    config = {"num_experts": 8, "top_k": 3, "backend": "triton"}
    of_weights, log = triton_experts.weight_gradient, []

    def logged_gradient(*args: Any) -> Tensor:
        log.append("weights")
        return of_weights(*args)

    triton_experts.weight_gradient = logged_gradient
    try:
        for sends, messages in (("picks", 1), ("tokens", 2)):
            case = Case(tokens, dtype, sends=sends, device=device, config=config)
            check(case, tolerance, group)
            for early, each in ((True, case), (False, dataclasses.replace(case, config=config | CAST))):
                log.clear()
                with logged(log):
                    actual(each, group)
                first = log.index("weights")
                wanted = ["send"] * messages, ["weights"] * 2, ["wait"] * messages
                order = (0, 1, 2) if early else (1, 0, 2)
                start = first - messages if early else first
                assert log[start:] == [step for part in order for step in wanted[part]], (sends, early, log)
                left = torch._C._distributed_c10d._get_work_registry_size()
                assert left == 0, f"{left} messages are waited for by nobody"
    finally:
        triton_experts.weight_gradient = of_weights


CAST = {"router_dtype": "fp64"}
