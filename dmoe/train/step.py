"""One optimiser step: accumulate gradients over micro-batches, clip, update; skip what is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dmoe.config import RunConfig
from dmoe.data import gather_windows
from dmoe.models import Decoder
from dmoe.moe import Recorder
from dmoe.train.device import autocast


@dataclass(frozen=True)
class StepResult:
    """What a step did."""

    loss: float
    """Cross entropy in nats per token, without the auxiliary losses."""
    grad_norm: float
    """Global gradient norm before clipping."""

    @property
    def finite(self) -> bool:
        """Whether the step was applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def micro_batches(
    tokens: np.ndarray, starts: np.ndarray, config: RunConfig, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets [micro_batch_size, seq_len] for the windows at `starts`."""
    size = config.train.micro_batch_size
    for i in range(0, len(starts), size):
        inputs, targets = gather_windows(tokens, starts[i : i + size], config.train.seq_len)
        yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def training_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    config: RunConfig,
    recorder: Recorder,
    device: torch.device,
) -> StepResult:
    """Forward and backward over `batches`, then the update unless the loss or the gradient norm is not finite.

    The auxiliary losses need `set_aux_loss_scale(model, 1 / number of micro-batches)`, done once by the caller.
    """
    num_micro_batches = config.train.batch_size // config.train.micro_batch_size
    total = torch.zeros((), device=device)
    for inputs, targets in batches:
        with autocast(config.train, device):
            loss = model.loss(inputs, targets) / num_micro_batches
        loss.backward()
        total += loss.detach()
        recorder.update()
    clip = config.optim.clip_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    result = StepResult(total.item(), grad_norm.item())
    if result.finite:
        optimizer.step()
    optimizer.zero_grad()
    return result
