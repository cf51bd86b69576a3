"""AdamW, its parameter groups, and the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import OptimConfig
from dmoe.models import Decoder
from dmoe.moe.sharded import local


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and fused expert tensors, the embedding and the head included;
    not to vectors (norms), biases, or `router.weight`, whose rows are per-expert vectors compared with each other."""
    return parameter.dim() >= 2 and not name.endswith("bias") and not name.endswith("router.weight")


class AdamW(torch.optim.AdamW):
    """AdamW whose arithmetic runs on each rank's own part of the parameters.

    An update is elementwise, so parts need nothing of each other. DTensors of different meshes cannot go into one fused
    operator, and their dispatch costs more than the arithmetic.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = [local(t) for t in tensors]
        return has_complex


def build_optimizer(model: nn.Module | list[Decoder], config: OptimConfig) -> AdamW:
    """AdamW with two groups, decayed and not, over a model or the parts of one. Frozen parameters are in neither."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for part in model if isinstance(model, list) else [model]:
        for name, parameter in part.named_parameters():
            if parameter.requires_grad:
                groups[decays(name, parameter)].append(parameter)
    return AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def apply_options(optimizer: torch.optim.AdamW, config: OptimConfig) -> None:
    """Set what a restored optimiser has from the run that saved it, and a resumed run may have changed."""
    for group, weight_decay in zip(optimizer.param_groups, (config.weight_decay, 0.0)):
        group.update(betas=config.betas, eps=config.eps, weight_decay=weight_decay)


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of optimiser step `step` (0-based) out of `total_steps`.

    Linear warm-up over `warmup_steps`, then "cosine": half a cosine to lr * min_lr_ratio at the last step; "wsd":
    constant, then linear to lr * min_lr_ratio over the last `decay_fraction` of the steps (Hu et al., "MiniCPM",
    arXiv:2404.06395); "constant".
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, round(total_steps * (1 - config.decay_fraction)))
    if config.schedule == "constant" or step < start:
        return config.lr
    progress = min(1.0, (step - start) / max(1, total_steps - 1 - start))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.schedule == "cosine" else 1 - progress
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)
