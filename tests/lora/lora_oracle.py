"""What tests of adapters compare with: weights W + scale * B A made in the open, and models small enough to look at."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from dmoe.config import ModelConfig, MoEConfig, TrainConfig
from dmoe.config.train import LoRAConfig
from dmoe.lora import adapted_modules
from dmoe.lora.adapters import LoRAExperts
from dmoe.models import Decoder

ALL = ("attention", "mlp", "experts", "router")
# Experts that are no power of two, a dense layer, shared experts, biases, a head that is tied.
CONFIG = ModelConfig(
    vocab_size=53, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=24,
    first_k_dense=1, max_seq_len=64,
    moe=MoEConfig(intermediate_size=8, num_experts=5, top_k=2, bias=True, shared_intermediate_size=8,
                  aux_loss_coef=0.1, z_loss_coef=0.01),
)  # fmt: skip


def lora_train(targets: tuple[str, ...] = ALL, **fields: object) -> TrainConfig:
    lora = LoRAConfig(rank=3, alpha=5.0, targets=targets)
    return replace(TrainConfig(device="cpu", precision="fp32"), lora=replace(lora, **fields))  # type: ignore[arg-type]


def base_model(config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder.on_meta(config).to(dtype).to_empty(device="cpu")
    model.init_weights(7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # biases that are not 0, and logits of the router that are not all alike
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=generator)
            if name.endswith("router.weight"):
                parameter.mul_(20)
    return model


@torch.no_grad()
def randomize_B(model: nn.Module, seed: int = 0) -> None:
    """Give the factors that are zero at first some values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """By the names of the base: W + scale * B A, differentiable in the factors. By einsum, not by `merge`."""
    weights = dict(model.named_parameters())
    for name, module in adapted_modules(model).items():
        s = module.lora_scale
        if isinstance(module, LoRAExperts):
            up = f"{name}.{module._up_name}_proj"
            B = module.up_lora_B.flatten(1, 2)
            weights[up] = weights[up] + s * torch.einsum("ehr,erd->ehd", B, module.up_lora_A)
            down = f"{name}.down_proj"
            update = torch.einsum("edr,erf->edf", module.down_lora_B, module.down_lora_A)
            weights[down] = weights[down] + s * update
        else:
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + s * module.lora_B @ module.lora_A
    return {name: weight for name, weight in weights.items() if "lora_" not in name}
