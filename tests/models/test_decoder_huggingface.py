"""`Decoder` against transformers: logits and gradients of whole tiny models with the same weights, in fp32."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_oracle import relative_error
from torch import nn

from dmoe.config import ModelConfig, MoEConfig
from dmoe.models import Decoder

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
}
NO_LOSSES: dict[str, Any] = {"aux_loss_coef": 0, "z_loss_coef": 0}
OURS = ModelConfig(
    vocab_size=101,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    qk_norm="none",
    rope_theta=5000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
    intermediate_size=40,
    max_seq_len=64,
    moe=MoEConfig(intermediate_size=24, num_experts=6, top_k=3, **NO_LOSSES),
)
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}


def mixtral() -> tuple[nn.Module, ModelConfig]:
    config = transformers.MixtralConfig(
        **TINY, **ROPE, intermediate_size=24, num_local_experts=6, num_experts_per_tok=3, sliding_window=None
    )
    return transformers.MixtralForCausalLM(config), OURS


def olmoe() -> tuple[nn.Module, ModelConfig]:
    # pad_token_id: its default, 1, is a row of the embedding that gets no gradient.
    config = transformers.OlmoeConfig(
        **TINY, **ROPE, intermediate_size=24, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False,
        pad_token_id=None,
    )  # fmt: skip
    ours = replace(OURS, qk_norm="full", moe=replace(OURS.moe, norm_topk_prob=False))
    return transformers.OlmoeForCausalLM(config), ours


def qwen3_moe() -> tuple[nn.Module, ModelConfig]:
    """Also a head width that is not hidden_size / heads, and a tied head."""
    config = transformers.Qwen3MoeConfig(
        **TINY, **ROPE, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True,
        head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config), replace(OURS, qk_norm="head", head_dim=16, tie_embeddings=True)


def qwen3_moe_with_dense_layers() -> tuple[nn.Module, ModelConfig]:
    config = transformers.Qwen3MoeConfig(
        **TINY, **ROPE, moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3, norm_topk_prob=True,
        head_dim=8, intermediate_size=40, mlp_only_layers=[0, 1],
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config), replace(OURS, qk_norm="head", moe_layer_freq=2, first_k_dense=1)


def llama() -> tuple[nn.Module, ModelConfig]:
    config = transformers.LlamaConfig(**TINY, **ROPE, intermediate_size=40)
    return transformers.LlamaForCausalLM(config), replace(OURS, moe_layer_freq=0)


def qwen3() -> tuple[nn.Module, ModelConfig]:
    config = transformers.Qwen3Config(**TINY, **ROPE, intermediate_size=40, head_dim=16)
    return transformers.Qwen3ForCausalLM(config), replace(OURS, moe_layer_freq=0, qk_norm="head", head_dim=16)


def our_name(name: str) -> str:
    return name.removeprefix("model.").replace(".mlp.gate.weight", ".mlp.router.weight")


@pytest.mark.parametrize(
    "family", [mixtral, olmoe, qwen3_moe, qwen3_moe_with_dense_layers, llama, qwen3], ids=lambda f: f.__name__
)
def test_logits_and_gradients(family: Callable[[], tuple[nn.Module, ModelConfig]]) -> None:
    theirs, config = family()
    ours = Decoder(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # norms away from 1, attention and routing away from flat
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3 if "norm" in name else 0.2)
    parameters = dict(theirs.named_parameters())
    state = {our_name(name): p.detach().clone() for name, p in parameters.items()}
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    ours.load_state_dict(state)
    assert ours.num_params() == sum(p.numel() for p in parameters.values())

    ids = torch.randint(0, 101, (2, 40))
    want, got = theirs(input_ids=ids, use_cache=False).logits, ours(ids)
    assert relative_error(got.detach(), want.detach()) <= 1e-5
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    gradients = {our_name(name): p.grad for name, p in parameters.items()}
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, gradients[name]) <= 3e-5, name
