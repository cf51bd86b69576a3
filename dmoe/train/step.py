"""One optimiser step: gradients of the whole batch, their norm, clipping, the update; skip what is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dmoe.config import OptimConfig
from dmoe.ops.regions import region
from dmoe.parallel.grad_norm import local_gradients, scale_gradients, squared_norm_share
from dmoe.train.engine import Batch, Engine


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank."""

    loss: float
    """Cross entropy in nats per token, without the auxiliary losses."""
    grad_norm: float
    """Global gradient norm before clipping."""
    stop: bool = False
    """Whether a rank asked to stop after this step."""

    @property
    def finite(self) -> bool:
        """Whether the step was applied."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def training_step(
    engine: Engine, optimizer: torch.optim.Optimizer, batch: Batch, config: OptimConfig, *, stop: bool = False
) -> StepResult:
    """Forward and backward over `batch`, then the update unless the loss or the gradient norm is not finite.

    Args:
        stop: this rank wants to stop; all ranks learn of it in the result.
    """
    loss = engine.forward_backward(batch)
    gradients = local_gradients(engine.parameters)
    squared = squared_norm_share(gradients, engine.mesh, skip=engine.second_copy)
    # One reduction and one wait for the device: loss, norm, and the wish to stop.
    shares = torch.stack([loss / engine.copies, squared.to(loss.device), torch.full_like(loss, float(stop))])
    with region("sync"):
        total, squared_norm, num_stops = engine.sum_over_ranks(shares).tolist()
    result = StepResult(total, math.sqrt(squared_norm), num_stops > 0)
    if result.finite:
        with region("optimizer"):
            if config.clip_norm and result.grad_norm > config.clip_norm:
                scale_gradients(gradients, config.clip_norm / (result.grad_norm + 1e-6))
            optimizer.step()
            engine.balancer.step()
    else:
        engine.balancer.discard()
    optimizer.zero_grad()
    return result
