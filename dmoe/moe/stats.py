"""What one forward of one layer did.

A layer overwrites its `LayerStats` at every forward; `Recorder.update()` adds them up. Overwriting makes recording
safe under activation checkpointing: the recomputed forward writes the same numbers again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.ops import router_entropy


class LayerStats:
    """The last forward of one layer: counts [E] and the scalars aux loss, z-loss, router entropy, on its device."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.tokens_per_expert_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.scalars = torch.zeros(3, device=device)

    @torch.no_grad()
    def write(self, tokens_per_expert_E: Tensor, scores_TE: Tensor, aux_loss: Tensor, z_loss: Tensor) -> None:
        self.tokens_per_expert_E.copy_(tokens_per_expert_E)
        self.scalars.copy_(torch.stack([aux_loss.detach(), z_loss.detach(), router_entropy(scores_TE.detach())]))
