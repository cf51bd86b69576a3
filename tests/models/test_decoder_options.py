"""Variants of the decoder by themselves: padding, recomputation, compilation, initial weights, counting, errors."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor

from dmoe.config import ModelConfig, MoEConfig
from dmoe.config.attention import LatentAttentionConfig, RopeConfig
from dmoe.errors import ConfigError
from dmoe.models import Attention, Decoder, LatentAttention
from dmoe.models.decoder import attended_keys
from dmoe.models.rope import position_tables
from dmoe.moe import Recorder

BASE = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, qk_norm="none",
    intermediate_size=40, max_seq_len=32, first_k_dense=1,
    moe=MoEConfig(intermediate_size=24, num_experts=4, top_k=2, aux_loss_coef=0.1, z_loss_coef=0.1),
)  # fmt: skip
YARN = RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=8, mscale=0.5, mscale_all_dim=1.0, interleaved=True)
LATENT = LatentAttentionConfig(kv_lora_rank=12, q_lora_rank=16, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=10)
VARIANTS = {
    "sinks": replace(
        BASE, attention_sinks=True, qkv_bias=True, attention_out_bias=True, attention_window=5,
        layer_attention=("sliding", "full"),
    ),
    "latent": replace(BASE, latent=LATENT, rope=YARN, qkv_bias=True),
    "chunks": replace(
        BASE, qk_norm="l2", attention_window=6, layer_attention=("chunked", "full"), layer_rope=(1, 0),
        attention_temperature_scale=0.2, attention_temperature_floor=3,
    ),
    "multipliers": replace(
        BASE, norm="layer", head_bias=True, mlp_bias=True, embedding_multiplier=3.0, residual_multiplier=0.4,
        logits_divisor=2.0, clip_qkv=1.5, rope=RopeConfig(fraction=0.5),
    ),
}  # fmt: skip


def build(config: ModelConfig) -> Decoder:
    """A model whose attention and routing are far from uniform."""
    model = Decoder(config)
    model.init_weights(seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter)) if name.endswith("bias") else None
            parameter.mul_(1 if "norm" in name else 10)
    return model


def gradients(model: Decoder, ids: Tensor, mask: Tensor | None) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    logits = model(ids, mask) if mask is None else model(ids, mask)[mask]
    loss = logits.square().mean()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputation_and_compilation_change_nothing(variant: str) -> None:
    """As the training loop does them, with one graph a layer; with padding and without."""
    model, ids = build(VARIANTS[variant]), torch.randint(0, 61, (2, 13))
    masks = (None, torch.arange(13) >= torch.tensor([[0], [5]]))
    wanted = [gradients(model, ids, mask) for mask in masks]
    assert all(g.abs().sum() > 0 for g in wanted[0][1].values()), "every parameter takes part"
    model.activation_checkpointing = True
    for mask, (want_loss, want) in zip(masks, wanted):
        loss, got = gradients(model, ids, mask)
        assert loss == want_loss
        assert all(torch.equal(got[name], want[name]) for name in want)
    torch.compiler.reset()
    for layer in model.layers:
        layer.compile(fullgraph=True, backend="eager")
    for mask, (want_loss, want) in zip(masks, wanted):
        loss, got = gradients(model, ids, mask)
        assert loss == pytest.approx(want_loss, rel=1e-5)
        for name in want:
            assert relative_error(got[name], want[name]) <= 1e-4, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_may_be_anything(variant: str) -> None:
    """Left, right and whole sequences, with embeddings that are not finite."""
    model = build(VARIANTS[variant])
    recorder = Recorder(model)
    ids = torch.randint(1, 60, (4, 11))
    lengths = torch.tensor([[11], [6], [0], [1]])
    columns = torch.arange(11)
    right, left = columns < lengths, columns >= 11 - lengths
    for mask, promises in ((right, (False, True)), (left, (False,))):
        model.zero_grad(set_to_none=True)
        want = model(ids, mask)
        want[mask].sum().backward()
        wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.embed_tokens.weight[[0, 60]] = torch.tensor([[float("nan")], [float("inf")]])
            broken.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        for right_padded in promises:
            for pad in (0, 60, -100, 10**6):
                broken.zero_grad(set_to_none=True)
                got = broken(ids.masked_fill(~mask, pad), mask, right_padded=right_padded)
                assert got.isfinite().all()
                assert relative_error(got[mask].detach(), want[mask].detach()) <= 1e-6
            got[mask].sum().backward()
            for name, p in broken.named_parameters():
                if name not in ("embed_tokens.weight", "lm_head.weight"):
                    assert relative_error(p.grad, wanted[name]) <= 1e-5, name
            assert broken.embed_tokens.weight.grad.isfinite().all()
    recorder.update()
    assert sum(recorder.summary()["layers.1.mlp"].tokens_per_expert) == 2 * left.sum()


def test_masks_of_another_shape_are_named() -> None:
    model, ids = build(BASE), torch.zeros(2, 5, dtype=torch.int64)
    for shape in ((2, 6), (1, 5), (5,), (2, 1, 5)):
        with pytest.raises(ConfigError, match=r"attention_mask shape is .*: must be \(2, 5\), that of the ids"):
            model(ids, torch.ones(shape))


def test_empty_batches_and_sequences_of_one_token() -> None:
    for config in VARIANTS.values():
        model = build(config)
        assert model(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 61)
        assert model(torch.zeros(2, 1, dtype=torch.int64), torch.tensor([[1], [0]])).isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_stays_close(variant: str) -> None:
    config = replace(VARIANTS[variant], clip_qkv=0.0, init_std=0.02)
    model, ids = Decoder(config), torch.randint(0, 61, (2, 13))
    model.init_weights()
    want = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(ids, ids)
        got = model(ids)
    assert relative_error(got.detach(), want.detach()) <= 5e-2
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_each_layer_has_its_own_kind() -> None:
    layers = ("sliding", "full", "chunked", "full")
    config = replace(BASE, num_layers=4, attention_window=7, layer_attention=layers, layer_rope=(1, 1, 0, 1))
    attentions = [layer.self_attn for layer in Decoder.on_meta(config).layers]
    assert [(a.options["window"], a.options["chunk"]) for a in attentions] == [(7, 0), (0, 0), (0, 7), (0, 0)]
    assert [a.has_rope for a in attentions] == [True, True, False, True]
    everywhere = Decoder.on_meta(replace(BASE, attention_window=7)).layers
    assert [layer.self_attn.options["window"] for layer in everywhere] == [7, 7]


def test_scales_of_attention() -> None:
    assert Attention(BASE).options["scale"] == 8**-0.5
    assert Attention(replace(BASE, attention_scale=0.3)).options["scale"] == 0.3
    latent = replace(BASE, latent=LATENT)
    assert LatentAttention(latent).options["scale"] == 10**-0.5
    scaled = replace(latent, rope=replace(YARN, factor=40.0, mscale_all_dim=0.707))
    mscale = 1.26080377  # 1 + 0.0707 ln 40
    assert LatentAttention(scaled).options["scale"] == pytest.approx(mscale**2 / 10**0.5)
    assert LatentAttention(replace(scaled, attention_scale=0.3)).options["scale"] == 0.3
    assert Attention(replace(BASE, rope=YARN)).options["scale"] == 8**-0.5


def test_initial_weights() -> None:
    for variant in ("sinks", "latent", "multipliers"):
        model = Decoder(VARIANTS[variant])
        model.init_weights(seed=1)
        again = Decoder.on_meta(VARIANTS[variant]).to_empty(device="cpu")
        again.init_weights(seed=1)
        for (name, p), q in zip(model.named_parameters(), again.parameters()):
            assert torch.equal(p, q), name
            if name.endswith("bias"):
                assert not p.any(), name
            elif "norm" in name:
                assert (p == 1).all(), name
            else:
                assert 0 < p.std() < 0.05, name


def test_parameters_and_flops_of_deepseek_v3_by_hand() -> None:
    config = replace(
        BASE, vocab_size=129280, hidden_size=7168, num_layers=61, num_heads=128, num_kv_heads=128,
        intermediate_size=18432, first_k_dense=3, tie_embeddings=False,
        latent=LatentAttentionConfig(kv_lora_rank=512, q_lora_rank=1536),
        moe=MoEConfig(intermediate_size=2048, num_experts=256, top_k=8, shared_intermediate_size=2048),
    )  # fmt: skip
    attention = 7168 * 1536 + 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168
    expert = 3 * 7168 * 2048
    total = (
        2 * 129280 * 7168 + 7168 + 61 * (attention + 2 * 7168) + 3 * 3 * 7168 * 18432 + 58 * (257 * expert + 256 * 7168)
    )
    model = Decoder.on_meta(config)
    assert model.num_params() == total == 671_026_404_352  # published: 671B, without the bias of the choice
    assert model.num_active_params() == total - 58 * 248 * expert
    active = model.num_active_params() - 129280 * 7168
    assert model.flops_per_token(4096) == 6 * active + 6 * 61 * 128 * (192 + 128) * 4096 / 2


def test_keys_of_windows_and_chunks() -> None:
    layers = ("full", "sliding", "chunked")
    config = replace(BASE, num_layers=3, attention_window=4, layer_attention=layers)
    for seq_len in (1, 3, 4, 5, 11, 12):
        queries = range(seq_len)
        # A query's own key counts half, as in the formula for causal attention.
        exact = [
            sum(q + 0.5 for q in queries),
            sum(min(q + 0.5, 4.0) for q in queries),
            sum(q % 4 + 0.5 for q in queries),
        ]
        got = [attended_keys(config, layer, seq_len) * seq_len for layer in range(3)]
        assert got[0] == exact[0]
        assert got[1] == pytest.approx(exact[1])
        assert got[2] == exact[2]
    windows = Decoder.on_meta(replace(config, layer_attention=("sliding",) * 3))
    full = Decoder.on_meta(replace(config, layer_attention=("full",) * 3))
    assert full.flops_per_token(12) - windows.flops_per_token(12) == 12 * 3 * 4 * 8 * (6 - (4 - 16 / 24))


def test_a_later_stage_takes_hidden_states() -> None:
    """Embedding and head, and their multipliers, are at the ends alone."""
    config = VARIANTS["multipliers"]
    model, ids = build(config), torch.randint(0, 61, (2, 9))
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    want = model(ids, mask)
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    first.is_last = last.is_first = False
    first.layers, last.layers = first.layers[:1], last.layers[1:]
    got = last(first(ids, mask), mask)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_attention": ("full",)}, "model.layer_attention is ('full',): must be 2 kinds of attention"),
        ({"layer_attention": ("full", "local")}, "must be one of full, sliding, chunked"),
        ({"layer_attention": ("full", "chunked")}, "model.attention_window is 0: must be greater than 0 with chunked"),
        ({"layer_rope": (1, 2)}, "model.layer_rope is (1, 2): must be 2 numbers (model.num_layers), each 0 or 1"),
        ({"layer_rope": (1,)}, "model.layer_rope is (1,): must be 2 numbers"),
        ({"attention_window": -1}, "model.attention_window is -1: must be 0 or greater"),
        ({"clip_qkv": -1.0}, "model.clip_qkv is -1.0: must be 0 or greater"),
        ({"attention_scale": float("nan")}, "model.attention_scale is nan: must be finite"),
        ({"attention_temperature_floor": 0}, "model.attention_temperature_floor is 0: must be greater than 0"),
        ({"logits_divisor": 0.0}, "model.logits_divisor is 0.0: must be greater than 0"),
        ({"norm": "batch"}, "model.norm is 'batch': must be one of rms, layer"),
        ({"latent": LATENT, "qk_norm": "head"}, "model.qk_norm is 'head': must be 'none' with latent attention"),
        ({"latent": LATENT, "attention_sinks": True}, "model.attention_sinks is True: must be False with latent"),
        ({"latent": LATENT, "clip_qkv": 1.0}, "model.clip_qkv is 1.0: must be 0.0 with latent attention"),
    ],
)
def test_what_the_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(BASE, **changes)
    assert message in str(caught.value)


def test_latent_attention_ignores_the_heads_of_grouped_queries() -> None:
    config = replace(BASE, latent=LATENT, head_dim=7, num_kv_heads=1)
    x, tables = torch.randn(2, 5, 32), position_tables(torch.arange(5), config)
    assert LatentAttention(config)(x, tables).shape == (2, 5, 32)
