"""Tiny random models of transformers, and what is compared of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 64
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "use_cache": False, "attn_implementation": "eager",
}  # fmt: skip
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 24}
_SHAPES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24},
    "qwen3_moe": {**_EXPERTS, "norm_topk_prob": True},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 40},
    "deepseek_v3": {
        "moe_intermediate_size": 24, "intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "gpt_oss": {
        "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "jamba": {
        "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "num_hidden_layers": 2,
        "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0,
        "use_mamba_kernels": False,
    },
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 24},
    "llama4_text": {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 24, "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 1,
    },
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 1, "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "kv_channels": 8},
}  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """A model in training mode, with weights large enough that every path carries a gradient."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    common = {} if kind == "dbrx" else _COMMON
    config = CONFIG_MAPPING[kind](**{**common, **_SHAPES[kind], **fields})
    if kind == "dbrx":
        config.vocab_size = VOCABULARY
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator).mul(0.1).to(parameter.dtype))
    return model.train()


def batch(padded: bool = False) -> dict[str, Tensor]:
    """2 sequences of 12; the second one is padded on the left."""
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :5], mask[1, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, gradients by name) of a loss with an effect of every logit."""
    model.zero_grad()
    logits = model(**inputs).logits
    (logits.float().logsumexp(-1).square().mean() + logits.float().square().mean()).backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def error(got: Tensor, want: Tensor) -> float:
    """The largest difference, relative to the largest value wanted."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))
