"""Presets: sizes against transformers and by hand, and a mistyped name."""

import pytest
import torch

from dmoe.errors import ConfigError
from dmoe.models import PRESETS, Decoder, count_parameters, get_preset


@pytest.mark.parametrize(
    ("typo", "hint"),
    [("tiny_moe", "did you mean tiny-moe?"), ("mixtral", "did you mean mixtral-8x7b?"), ("olmoe1b7b", "olmoe-1b-7b?")],
)
def test_mistyped_preset(typo: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        get_preset(typo)
    message = str(caught.value)
    assert message.startswith(f"preset is {typo!r}: must be one of tiny-moe, ")
    assert hint in message
    assert "\n" not in message


def test_unlike_every_preset() -> None:
    with pytest.raises(ConfigError) as caught:
        get_preset("zzzz")
    assert "did you mean" not in str(caught.value)


def test_tiny_moe_by_hand() -> None:
    # Width 128, 4 layers, 2 heads of 64 and 1 key/value head, vocabulary 2048, head tied.
    embedding = 2048 * 128
    # q 128 * 128, k and v 64 * 128 each, o 128 * 128, two norms over a head of 64.
    attention = 128 * 128 + 2 * 64 * 128 + 128 * 128 + 2 * 64
    expert = 3 * 128 * 192
    router = 8 * 128
    norms = 2 * 128
    layer = attention + router + norms
    total = embedding + 4 * (layer + 8 * expert) + 128
    active = embedding + 4 * (layer + 2 * expert) + 128
    assert (total, active) == (2_823_808, 1_054_336)
    # At 256 tokens: 6 * active, and 12 * 4 layers * 2 heads * 64 * 256 / 2 for causal attention.
    flops = 6 * active + 12 * 4 * 2 * 64 * 256 / 2
    assert flops == 7_112_448
    assert count_parameters(get_preset("tiny-moe"), 256) == {
        "num_params": total,
        "num_active_params": active,
        "flops_per_token": flops,
    }


def test_tiny_dense_matches_tiny_moe_in_active_parameters() -> None:
    dense, moe = (count_parameters(get_preset(f"tiny-{kind}"), 256) for kind in ("dense", "moe"))
    assert dense["num_params"] == dense["num_active_params"] == moe["num_active_params"] - 4 * 8 * 128


def test_untied_embedding_costs_no_flops() -> None:
    # OLMoE at 4096 tokens. Active: 1,282,017,280 parameters, of which 50304 * 2048 are a look-up.
    counts = count_parameters(get_preset("olmoe-1b-7b"), 4096)
    lookup = 50304 * 2048
    assert counts["flops_per_token"] == 6 * (1_282_017_280 - lookup) + 12 * 16 * 16 * 128 * 4096 / 2


# The values of each model's published config.json.
PUBLISHED = {
    "mixtral-8x7b": (
        "Mixtral",
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
            "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
            "tie_word_embeddings": False, "sliding_window": None,
        },
        46_702_792_704,
    ),
    "olmoe-1b-7b": (
        "Olmoe",
        {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
        6_919_161_856,
    ),
    "qwen3-30b-a3b": (
        "Qwen3Moe",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "norm_topk_prob": True, "tie_word_embeddings": False, "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        },
        30_532_122_624,
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_real_presets_against_transformers(preset: str) -> None:
    transformers = pytest.importorskip("transformers")
    family, values, num_params = PUBLISHED[preset]
    with torch.device("meta"):
        theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**values))
    ours = Decoder.on_meta(get_preset(preset))
    shapes = {
        name.removeprefix("model.").replace("mlp.gate.", "mlp.router."): p.shape
        for name, p in theirs.named_parameters()
    }
    assert {name: p.shape for name, p in ours.named_parameters()} == shapes
    assert ours.num_params() == num_params

    config = get_preset(preset)
    assert config.rope_theta == values["rope_theta"]
    assert config.norm_eps == values["rms_norm_eps"]
    assert config.max_seq_len == values["max_position_embeddings"]
    assert config.moe.norm_topk_prob == values.get("norm_topk_prob", True)
    assert config.moe.top_k == values["num_experts_per_tok"]


@pytest.mark.parametrize(
    ("preset", "idle_experts", "expert", "layers"),
    [
        ("mixtral-8x7b", 6, 3 * 4096 * 14336, 32),
        ("olmoe-1b-7b", 56, 3 * 2048 * 1024, 16),
        ("qwen3-30b-a3b", 120, 3 * 2048 * 768, 48),
    ],
)
def test_active_parameters_of_real_presets(preset: str, idle_experts: int, expert: int, layers: int) -> None:
    active = Decoder.on_meta(get_preset(preset)).num_active_params()
    assert active == PUBLISHED[preset][2] - layers * idle_experts * expert
    published = {"mixtral-8x7b": 12.9e9, "olmoe-1b-7b": 1.3e9, "qwen3-30b-a3b": 3.3e9}[preset]
    assert active == pytest.approx(published, rel=0.02)


def test_every_preset_has_a_name_to_itself() -> None:
    assert list(PRESETS)[:2] == ["tiny-moe", "tiny-dense"]
    assert set(PRESETS) > {"olmoe-1b-7b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b", "llama-3.1-8b"}
    assert len(set(map(repr, PRESETS.values()))) == len(PRESETS)
