"""What one forward of one layer did.

A layer overwrites what it has of these objects at every forward; `Recorder.update()` and `LoadBalancer` add up. What
activation checkpointing repeats is written once: the load of the step may have grown by then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.moe.batch_sums import NUM_SUMS, BatchSums


class LayerStats:
    """For `Recorder`: sums over all ranks, as in `BatchSums.flat`. What is made of them is worked out later, for all
    layers at once, so that a forward has little to add."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.flat = torch.zeros(3 * num_experts + NUM_SUMS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def write(self, sums: BatchSums) -> None:
        self.flat.copy_(sums.flat)


class StepLoad:
    """For `LoadBalancer`: picks of each expert, over all ranks, int64 [E]."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.last_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        """Of the last forward in training."""
        self.step_E: Tensor = torch.zeros_like(self.last_E)
        """Of the optimiser step, without forwards of the model that have not ended."""

    @torch.no_grad()
    def write(self, sums: BatchSums) -> None:
        self.last_E.copy_(sums.tokens_per_expert_E)
