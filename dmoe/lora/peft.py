"""Adapters in the format of PEFT (`adapter_config.json`, `adapter_model.safetensors`), for a transformers model.

A linear map has `NAME.lora_A.weight` [r, in] and `NAME.lora_B.weight` [out, r]: our factors. A parameter that belongs
to no linear map, an expert projection or a router's weight, is what PEFT calls a target parameter (version 0.17 and
later). Its factors have two dims: A [E r, in], row e r + k, and B [out, r E], column k E + e, for k of r and expert e.
The wrappers of two target parameters of one module are nested in the order of the module: the first, `gate_up_proj`, is
called `base_layer` of the second, `down_proj`. All under `base_model.model.` and the name in the transformers model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dmoe.config import ModelConfig, require
from dmoe.config.train import LoRAConfig
from dmoe.lora.adapters import LoRAExperts, LoRARouter, adapted_modules
from dmoe.lora.names import matches
from dmoe.moe.sharded import is_plain

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def export_peft(model: nn.Module, config: ModelConfig, lora: LoRAConfig, folder: Path, *, base: str = "") -> None:
    """Write the adapters of `model`, which is whole, into `folder`, which is made.

    Names are those of transformers' models with `mlp.gate` as router (Qwen2 and 3, OLMoE, Mixtral from version 5 on,
    DeepSeek) and of the Llama family.

    Args:
        base: what PEFT loads the model from, written as "base_model_name_or_path".

    Raises:
        ConfigError: the model is spread over ranks, or has adapters that PEFT has no way to name: on plain experts, and
            beside experts on dense networks and shared experts, whose projections it takes for those of experts in the
            form that they had before transformers 5.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    parameters: list[str] = []
    for name, module in adapted_modules(model).items():
        for leaf, factor in module.named_parameters(recurse=False):
            require(is_plain(factor), leaf, type(factor).__name__, "whole, for an export")
        target = _their_name(name, config)
        if config.moe_layers() and isinstance(module, nn.Linear) and not matches(name, "attention"):
            wanted = "without adapters outside of attention, experts and router, for an export of a model with experts"
            require(False, "train.lora.targets", lora.targets, f"{wanted}, because PEFT mistakes {target}")
        found: dict[str, tuple[Tensor, Tensor]]
        if isinstance(module, LoRAExperts):
            require(config.moe.gated, "model.moe.gated", False, "True for an export of adapters on experts")
            up_A, up_B, down_A, down_B = module.adapters()
            found = {f"{target}.base_layer": _flat(up_A, up_B), target: _flat(down_A, down_B)}
            parameters += [f"{target}.gate_up_proj", f"{target}.down_proj"]
        else:
            factors: Any = module
            found = {target: (factors.lora_A, factors.lora_B)}
            if isinstance(module, LoRARouter):
                parameters.append(f"{target}.weight")
            else:
                modules.append(target)
        for key, (A, B) in found.items():
            tensors[f"base_model.model.{key}.lora_A.weight"] = A.detach().contiguous()
            tensors[f"base_model.model.{key}.lora_B.weight"] = B.detach().contiguous()
    content = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or None,
        "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": 0.0 if parameters else lora.dropout,
        "target_modules": modules, "target_parameters": parameters or None,
        "bias": "none", "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _flat(A_ErM: Tensor, B_ENr: Tensor) -> tuple[Tensor, Tensor]:
    return A_ErM.flatten(0, 1), B_ENr.permute(1, 2, 0).flatten(1, 2)


def _their_name(name: str, config: ModelConfig) -> str:
    name = name.replace(".mlp.router", ".mlp.gate")
    if config.moe.shared_expert_gate:  # Qwen2
        name = name.replace(".shared_experts.", ".shared_expert.")
    return f"model.{name}"
