"""Variants of attention, position and norm against transformers: whole tiny models with the same weights, in fp32."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor, nn

from dmoe.config import ModelConfig, MoEConfig
from dmoe.config.attention import LatentAttentionConfig, RopeConfig
from dmoe.models import Decoder

transformers = pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "hidden_act": "silu", "pad_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
OURS = ModelConfig(
    vocab_size=101, hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="none",
    rope_theta=5000.0, norm_eps=1e-5, tie_embeddings=False, intermediate_size=40, max_seq_len=64,
    moe=MoEConfig(intermediate_size=24, num_experts=6, top_k=3, aux_loss_coef=0, z_loss_coef=0),
)  # fmt: skip
DENSE = replace(OURS, moe_layer_freq=0)
EXPERTS: dict[str, Any] = {"num_local_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24}
Pair = tuple[nn.Module, ModelConfig]


def rope(kind: str = "default", **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}}


def mixtral_with_a_window() -> Pair:
    config = transformers.MixtralConfig(**TINY, **rope(), **EXPERTS, sliding_window=7)
    return transformers.MixtralForCausalLM(config), replace(OURS, attention_window=7)


def qwen2_moe() -> Pair:
    """Biases of queries, keys and values, and windows in some layers."""
    config = transformers.Qwen2MoeConfig(
        **TINY, **rope(), moe_intermediate_size=24, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False,
        shared_expert_intermediate_size=20, use_sliding_window=True, sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    moe = replace(OURS.moe, norm_topk_prob=False, shared_intermediate_size=20, shared_expert_gate=True)
    layers = ("sliding", "full", "sliding")
    return transformers.Qwen2MoeForCausalLM(config), replace(
        OURS, qkv_bias=True, attention_window=5, layer_attention=layers, moe=moe
    )


LATENT: dict[str, Any] = {
    "kv_lora_rank": 12, "q_lora_rank": 16, "qk_rope_head_dim": 6, "qk_nope_head_dim": 8, "v_head_dim": 10,
}  # fmt: skip
YARN: dict[str, Any] = {
    "factor": 4.0, "beta_fast": 3.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.3,
}  # fmt: skip


def deepseek_v3(interleave: bool = True) -> Pair:
    config = transformers.DeepseekV3Config(
        **TINY | {"num_key_value_heads": 4}, **LATENT, attention_bias=True, rope_interleave=interleave,
        **rope("yarn", **YARN, original_max_position_embeddings=16), intermediate_size=40, moe_intermediate_size=24,
        n_routed_experts=8, n_shared_experts=1, n_group=4, topk_group=2, num_experts_per_tok=3,
        first_k_dense_replace=1, routed_scaling_factor=1.7, norm_topk_prob=True,
    )  # fmt: skip
    moe = replace(
        OURS.moe, num_experts=8, score_function="sigmoid", n_group=4, topk_group=2, group_score_top=2,
        routed_scaling_factor=1.7, shared_intermediate_size=24, expert_bias_rate=0.001,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config), replace(
        OURS, qkv_bias=True, attention_out_bias=True, first_k_dense=1, moe=moe, latent=LatentAttentionConfig(**LATENT),
        rope=RopeConfig(scaling="yarn", **YARN, original_max_seq_len=16, interleaved=interleave),
    )  # fmt: skip


def deepseek_v3_half_split() -> Pair:
    return deepseek_v3(interleave=False)


def deepseek_v2() -> Pair:
    """Queries projected directly, no factor on the scale of attention."""
    yarn = {key: value for key, value in YARN.items() if "mscale" not in key}
    config = transformers.DeepseekV2Config(
        **TINY | {"num_key_value_heads": 4}, **LATENT | {"q_lora_rank": None},
        **rope("yarn", **yarn, original_max_position_embeddings=16), intermediate_size=40, moe_intermediate_size=24,
        n_routed_experts=6, n_shared_experts=2, num_experts_per_tok=3, first_k_dense_replace=1,
    )  # fmt: skip
    return transformers.DeepseekV2ForCausalLM(config), replace(
        OURS, first_k_dense=1, moe=replace(OURS.moe, norm_topk_prob=False, shared_intermediate_size=48),
        latent=LatentAttentionConfig(**LATENT | {"q_lora_rank": 0}),
        rope=RopeConfig(scaling="yarn", **yarn, original_max_seq_len=16, interleaved=True),
    )  # fmt: skip


def gpt_oss() -> Pair:
    """Sinks, windows in every other layer, YaRN with borders that are not rounded."""
    yarn = {"factor": 4.0, "beta_fast": 3.0, "beta_slow": 0.5, "truncate": False}
    config = transformers.GptOssConfig(
        **TINY | {"num_hidden_layers": 4}, **rope("yarn", **yarn, original_max_position_embeddings=16), **EXPERTS,
        head_dim=16, sliding_window=6,
    )  # fmt: skip
    moe = replace(
        OURS.moe, bias=True, router_bias=True, softmax_after_topk=True, activation="clamped_swiglu",
    )  # fmt: skip
    return transformers.GptOssForCausalLM(config), replace(
        OURS, num_layers=4, head_dim=16, qkv_bias=True, attention_out_bias=True, attention_sinks=True,
        attention_window=6, layer_attention=("sliding", "full") * 2, moe=moe,
        rope=RopeConfig(scaling="yarn", **yarn, original_max_seq_len=16),
    )  # fmt: skip


def llama4_text(scaled: bool = False) -> Pair:
    """Chunks, l2 norms, and layers without a position whose queries have a temperature. Dense layers."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters = rope("llama3", **scaling, original_max_position_embeddings=32) if scaled else rope()
    config = transformers.Llama4TextConfig(
        **TINY, **parameters, head_dim=8, intermediate_size=24, intermediate_size_mlp=40, moe_layers=[],
        no_rope_layers=[1, 0, 1], attention_chunk_size=9, floor_scale=4, attn_scale=0.3,
    )  # fmt: skip
    ours = RopeConfig(scaling="llama3" if scaled else "none", original_max_seq_len=32, interleaved=True, factor=8.0)
    return transformers.Llama4ForCausalLM(config), replace(
        DENSE, qk_norm="l2", layer_rope=(1, 0, 1), attention_window=9, layer_attention=("chunked", "full", "chunked"),
        attention_temperature_scale=0.3, attention_temperature_floor=4, rope=ours,
    )  # fmt: skip


def llama4_text_scaled() -> Pair:
    return llama4_text(scaled=True)


def granite_moe() -> Pair:
    config = transformers.GraniteMoeConfig(
        **TINY | {"tie_word_embeddings": True}, **rope(), **EXPERTS, embedding_multiplier=6.0, logits_scaling=3.0,
        residual_multiplier=0.22, attention_multiplier=0.4, attention_bias=True,
    )  # fmt: skip
    return transformers.GraniteMoeForCausalLM(config), replace(
        OURS, tie_embeddings=True, embedding_multiplier=6.0, logits_divisor=3.0, residual_multiplier=0.22,
        attention_scale=0.4, qkv_bias=True, attention_out_bias=True, moe=replace(OURS.moe, softmax_after_topk=True),
    )  # fmt: skip


LONGROPE: dict[str, Any] = {"short_factor": [1.1, 1.2, 1.5, 2.0], "long_factor": [1.0, 2.0, 3.0, 9.0]}


def phimoe() -> Pair:
    """LayerNorm and biases everywhere, in and beyond the original length of LongRoPE. Its experts are made dense."""
    config = transformers.PhimoeConfig(
        **TINY, **rope("longrope", **LONGROPE, original_max_position_embeddings=48, short_mscale=1.2, long_mscale=1.4),
        **EXPERTS, attention_bias=True, lm_head_bias=True,
    )  # fmt: skip
    theirs = transformers.PhimoeForCausalLM(config)
    for layer in theirs.model.layers:
        layer.mlp = type(transformers.LlamaForCausalLM(llama_config()).model.layers[0].mlp)(llama_config(mlp_bias=True))
    scaling = RopeConfig(
        scaling="longrope", short_factors=tuple(LONGROPE["short_factor"]), short_mscale=1.2, long_mscale=1.4,
        long_factors=tuple(LONGROPE["long_factor"]), original_max_seq_len=48,
    )  # fmt: skip
    return theirs, replace(
        DENSE, norm="layer", qkv_bias=True, attention_out_bias=True, head_bias=True, mlp_bias=True, rope=scaling
    )


def llama_config(**changes: Any) -> Any:
    return transformers.LlamaConfig(**TINY | {"intermediate_size": 40, "num_hidden_layers": 1}, **changes)


def llama3() -> Pair:
    """One key/value head, heads wider than hidden_size / heads, a tied head, the scaling of Llama 3.1."""
    config = transformers.LlamaConfig(
        **TINY | {"num_key_value_heads": 1, "tie_word_embeddings": True}, intermediate_size=40, head_dim=20,
        **rope("llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=3.0, original_max_position_embeddings=32),
        mlp_bias=True,
    )  # fmt: skip
    scaling = RopeConfig(
        scaling="llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=3.0, original_max_seq_len=32
    )
    return transformers.LlamaForCausalLM(config), replace(
        DENSE, num_kv_heads=1, head_dim=20, tie_embeddings=True, mlp_bias=True, rope=scaling
    )


def olmoe_clipped() -> Pair:
    config = transformers.OlmoeConfig(
        **TINY, **rope("linear", factor=3.0), intermediate_size=24, num_experts=6, num_experts_per_tok=3,
        norm_topk_prob=False, clip_qkv=0.8,
    )  # fmt: skip
    return transformers.OlmoeForCausalLM(config), replace(
        OURS, qk_norm="full", clip_qkv=0.8, moe=replace(OURS.moe, norm_topk_prob=False),
        rope=RopeConfig(scaling="linear", factor=3.0),
    )  # fmt: skip


FAMILIES = [
    mixtral_with_a_window, qwen2_moe, deepseek_v3, deepseek_v3_half_split, deepseek_v2, gpt_oss, llama4_text,
    llama4_text_scaled, granite_moe, phimoe, llama3, olmoe_clipped,
]  # fmt: skip


def our_tensor(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The same weight in our form. It is linear, so that it turns gradients too."""
    name = name.removeprefix("model.").replace(".block_sparse_moe.", ".mlp.").replace(".feed_forward.", ".mlp.")
    name = name.replace(".mlp.gate.", ".mlp.router.").replace(".shared_expert.", ".shared_experts.")
    name = name.replace("proj_bias", "bias")
    of_gpt_oss = name.endswith(("gate_up_bias", "down_bias")) or tensor.shape[1:] in ((32, 48), (24, 32))
    if of_gpt_oss and tensor.dim() == 3:
        tensor = tensor.transpose(1, 2)
    if of_gpt_oss and "gate_up" in name:  # gate and up in turns
        tensor = torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)
    return name, tensor


def same_weights(family: Callable[[], Pair], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Decoder]:
    torch.manual_seed(0)
    theirs, config = family()
    theirs, ours = theirs.to(dtype).eval(), Decoder(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():  # norms away from 1, attention and routing away from flat
            parameter.normal_(mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.3)
        for name, buffer in theirs.named_buffers():
            if name.endswith("correction_bias"):
                buffer.normal_(std=0.1)
    tensors = dict(theirs.named_parameters()) | {n: b for n, b in theirs.named_buffers() if "correction_bias" in n}
    state = dict(our_tensor(name, tensor.detach()) for name, tensor in tensors.items())
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    ours.load_state_dict(state)
    return theirs, ours


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_logits_and_gradients(family: Callable[[], Pair]) -> None:
    theirs, ours = same_weights(family)
    ids = torch.randint(0, 101, (2, 40))
    want, got = theirs(input_ids=ids, use_cache=False).logits, ours(ids)
    assert relative_error(got.detach(), want.detach()) <= 1e-5
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    gradients = dict(our_tensor(name, p.grad) for name, p in theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert relative_error(p.grad, gradients[name]) <= 3e-5, name


PADDED = [mixtral_with_a_window, deepseek_v3, gpt_oss, llama4_text, phimoe]


def padding(kind: str) -> Tensor:
    """A mask [4, 23]: none, a few, nearly all and, where that is possible, one in the middle."""
    lengths = torch.tensor([23, 17, 1, 12]).unsqueeze(1)
    mask = torch.arange(23) < lengths
    if kind == "left":
        return mask.flip(1)
    if kind == "anywhere":
        mask[0, 9] = mask[3, :2] = False
    return mask


@pytest.mark.parametrize("family", PADDED, ids=lambda f: f.__name__)
def test_padding(family: Callable[[], Pair]) -> None:
    theirs, ours = same_weights(family)
    ids = torch.randint(0, 101, (4, 23))
    for kind in ("left", "right", "anywhere"):
        mask = padding(kind)
        with torch.no_grad():
            want = theirs(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            got = {"ints": ours(ids, mask.long()), "bools": ours(ids, mask)}
            if kind == "right":
                got["fast"] = ours(ids, mask, right_padded=True)
            got["other ids"] = ours(ids.masked_fill(~mask, -100), mask)
        for name, logits in got.items():
            assert logits.isfinite().all(), (kind, name)
            assert relative_error(logits[mask], want[mask]) <= 1e-5, (kind, name)


def test_padding_differs_from_no_padding() -> None:
    """Left padding moves positions, as in transformers' forward; a chunk begins with the first token."""
    _, ours = same_weights(llama4_text)
    ids = torch.randint(0, 101, (1, 20))
    mask = torch.arange(20).unsqueeze(0) >= 4
    with torch.no_grad():
        assert relative_error(ours(ids, mask)[:, 4:], ours(ids)[:, 4:]) > 1e-2
