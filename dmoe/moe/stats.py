"""What one forward of one layer did.

A layer overwrites its `LayerStats` at every forward; `Recorder.update()` adds them up. Overwriting makes recording
safe under activation checkpointing: the recomputed forward writes the same numbers again.
"""

from __future__ import annotations

import torch

from dmoe.moe.batch_sums import BatchSums


class LayerStats:
    """The last forward of one layer, over all ranks: counts [E] and the scalars aux loss, z-loss, router entropy."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.tokens_per_expert_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.scalars = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def write(self, sums: BatchSums) -> None:
        self.tokens_per_expert_E.copy_(sums.tokens_per_expert_E)
        self.scalars.copy_(sums.scalars)
