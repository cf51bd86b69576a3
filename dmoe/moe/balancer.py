"""Balancing over optimiser steps: the load of all micro-batches of a step, and the bias of the choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dmoe.moe.layer import MoE, moe_layers
from dmoe.moe.stats import StepLoad
from dmoe.ops.balancing import expert_bias_update


class LoadBalancer:
    """Adds up the load of every forward in training mode, and moves the bias of the choice once a step.

        balancer = LoadBalancer(model)
        loss.backward(); optimizer.step(); balancer.step()

    For layers with `expert_bias_rate` (Wang et al., "Auxiliary-loss-free load balancing", arXiv:2408.15664) or
    `global_aux_loss_coef`. The load is that of all ranks of a layer's `groups.batch`, so that every rank moves its copy
    of the bias alike; under DistributedDataParallel too the ranks must be set there.

    Attach it after the model is on its device. One at a time: a new balancer replaces the old one; `detach()` ends it.

    Args:
        model: the module whose forwards are counted, or the parts of a pipeline. Not a module that activation
            checkpointing runs again as a whole. With `global_aux_loss_coef` checkpoint with use_reentrant=False.
    """

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self._parts = [model] if isinstance(model, nn.Module) else list(model)
        for part in self._parts:
            layers = _balanced_layers(part)
            for layer in layers:
                layer.step_load = StepLoad(layer.config.num_experts, layer.router.weight.device)
            if layers and _count not in part._forward_hooks.values():
                part.register_forward_hook(_count)

    @torch.no_grad()
    def step(self) -> None:
        """Move the biases by the load since the last step, and begin a new one. Stays on the device."""
        for part in self._parts:
            for layer in _balanced_layers(part):
                bias, load = layer.router.e_score_correction_bias, layer.step_load
                if bias is not None and load is not None:
                    bias.copy_(expert_bias_update(bias, load.step_E, layer.config.expert_bias_rate))
        self.discard()

    def discard(self) -> None:
        """Forget the load of a step that was not taken."""
        for part in self._parts:
            for layer in _balanced_layers(part):
                if layer.step_load is not None:
                    layer.step_load.step_E.zero_()

    def detach(self) -> None:
        """Stop counting."""
        for part in self._parts:
            for layer in _balanced_layers(part):
                layer.step_load = None


def _balanced_layers(part: nn.Module) -> list[MoE]:
    return [layer for layer in moe_layers(part).values() if layer.config.balances_over_steps]


@torch.no_grad()
def _count(part: nn.Module, inputs: Any, output: Any) -> None:
    """After a forward of a part: what its layers did last is what this forward did.

    It looks for the layers of the part that it is called with, so that a copy of a part counts for itself.
    """
    if part.training:
        for layer in _balanced_layers(part):
            if layer.step_load is not None:
                layer.step_load.step_E += layer.step_load.last_E
