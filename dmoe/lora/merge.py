"""Folding adapters into the weights that they adapt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.errors import ConfigError
from dmoe.lora.adapters import LoRAExperts, adapted_modules, remove_adapters
from dmoe.moe.sharded import is_plain


@torch.no_grad()
def merge(model: nn.Module) -> int:
    """Replace every adapted weight W by W + scale * B A and remove the adapters; returns how many modules had one.

    The sum is made in fp32 (fp64 for fp64 weights) and rounded once. The model computes what it did, to rounding, and
    has the parameters of a model that never had adapters, which stay frozen.

    Raises:
        ConfigError: the model is spread over ranks.
    """
    modules: dict[str, Any] = dict(adapted_modules(model))
    for name, module in modules.items():
        if not all(is_plain(parameter) for parameter in module.parameters(recurse=False)):
            raise ConfigError(f"{name} is spread over ranks: must be whole to be merged; dmoe lora merge reads a run")
    for module in modules.values():
        scale = module.lora_scale
        if isinstance(module, LoRAExperts):
            up_A, up_B, down_A, down_B = module.adapters()
            _add(getattr(module, f"{module._up_name}_proj"), up_B, up_A, scale)
            _add(module.down_proj, down_B, down_A, scale)
        else:
            _add(module.weight, module.lora_B, module.lora_A, scale)
        remove_adapters(module)
    return len(modules)


def _add(weight: Any, B: Tensor, A: Tensor, scale: float) -> None:
    if weight.dim() == 3:  # expert by expert: the whole update would take as much memory as the experts
        for parts in zip(weight, B, A):
            _add(*parts, scale)
        return
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    weight.copy_(torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scale))
