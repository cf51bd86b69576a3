"""Small models for the tests of Megatron's and MegaBlocks' files, and a source in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dmoe.checkpoint.formats.names import tensor_shapes
from dmoe.config import ModelConfig, MoEConfig

# 3 experts on each of 2 ranks; vocabulary, widths of experts and of the network are no powers of two.
BASE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8,
    "qk_norm": "none", "tie_embeddings": False, "intermediate_size": 44, "norm_eps": 1e-5, "max_seq_len": 64,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 6, "top_k": 2, "intermediate_size": 20}
QWEN2 = {"norm_topk_prob": False, "shared_intermediate_size": 28, "shared_expert_gate": True}
DEEPSEEK = {
    "score_function": "sigmoid", "expert_bias_rate": 0.002, "n_group": 3, "topk_group": 2, "top_k": 4,
    "routed_scaling_factor": 2.5, "shared_intermediate_size": 28, "aux_loss_coef": 0.0, "seq_aux_loss_coef": 1e-4,
}  # fmt: skip
CONFIGS = {
    "mixtral": ModelConfig(**BASE, moe=MoEConfig(**MOE)),
    "llama": ModelConfig(**BASE | {"num_kv_heads": 4}, moe_layer_freq=0),
    "tied": ModelConfig(**BASE | {"tie_embeddings": True, "qkv_bias": True, "rope_theta": 1e6}, moe_layer_freq=0),
    "qwen2": ModelConfig(
        **BASE | {"num_layers": 4, "num_kv_heads": 1, "head_dim": 12}, qkv_bias=True,
        moe_layer_pattern=(0, 1, 1, 0), moe=MoEConfig(**MOE | QWEN2),
    ),
    "qwen3": ModelConfig(**BASE | {"qk_norm": "head"}, moe=MoEConfig(**MOE | {"top_k": 6})),
    "deepseek": ModelConfig(**BASE, moe=MoEConfig(**MOE | DEEPSEEK)),
}  # fmt: skip


class MemorySource:
    """Random weights."""

    def __init__(self, config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.state: dict[str, Tensor] = {}
        for name, shape in tensor_shapes(config).items():
            tensor = torch.randn(shape, generator=generator)
            bias = name.endswith("e_score_correction_bias")
            self.state[name] = tensor if bias else tensor.to(dtype)

    def names(self) -> Iterable[str]:
        return self.state

    def dtype(self, name: str) -> torch.dtype:
        return self.state[name].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        return self.state[name] if index is None else self.state[name][index]


def assert_same(got: Any, wanted: MemorySource) -> None:
    """Every tensor bit for bit, and rows of experts read alone."""
    assert set(got.names()) == set(wanted.names())
    for name, tensor in wanted.state.items():
        assert got.dtype(name) == tensor.dtype, name
        assert torch.equal(got.read(name), tensor), name
        if ".experts." in name:
            assert torch.equal(got.read(name, tensor.shape[0] - 1), tensor[-1]), name


def same_model(got: ModelConfig, wanted: ModelConfig) -> bool:
    """Equal but for how weights are divided by their sum, which is said in two ways."""
    moe = dataclasses.replace(got.moe, softmax_after_topk=wanted.moe.softmax_after_topk)
    if not wanted.moe_layers():
        return got == dataclasses.replace(wanted, moe=got.moe)
    return dataclasses.replace(got, moe=moe) == wanted
