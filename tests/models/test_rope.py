"""Rotary frequencies of published models against transformers' functions, rotation against complex numbers in fp64."""

import math
from typing import Any

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor

from dmoe.config import ModelConfig
from dmoe.config.attention import LatentAttentionConfig, RopeConfig
from dmoe.errors import ConfigError
from dmoe.models.rope import apply_rotary, position_tables, rotary_frequencies, rotary_tables, yarn_mscale

LONG = {"short_factor": [1.0 + i / 64 for i in range(32)], "long_factor": [1.5 + i for i in range(32)]}
PUBLISHED: dict[str, tuple[int, float, int, dict[str, Any]]] = {
    # rotated dimensions, theta, max_seq_len, scaling
    "deepseek-v3": (64, 1e4, 163840, {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
                    "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096}),
    "deepseek-v2-lite": (64, 1e4, 163840, {"rope_type": "yarn", "factor": 40.0, "beta_fast": 32.0, "beta_slow": 1.0,
                         "mscale": 0.707, "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096}),
    "uneven mscales": (64, 1e4, 4096, {"rope_type": "yarn", "factor": 3.0, "beta_fast": 32.0, "beta_slow": 1.0,
                       "mscale": 0.5, "mscale_all_dim": 2.0, "original_max_position_embeddings": 2048}),
    "gpt-oss-20b": (64, 1.5e5, 131072, {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                    "truncate": False, "original_max_position_embeddings": 4096}),
    "qwen3-yarn": (128, 1e6, 131072, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    "attention_factor": (128, 1e6, 4096, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25,
                         "original_max_position_embeddings": 1024}),
    "llama-3.1-8b": (128, 5e5, 131072, {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "llama-4-scout": (128, 5e5, 131072, {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                      "high_freq_factor": 1.5, "original_max_position_embeddings": 8192}),
    "no-frequencies-between": (128, 5e5, 131072, {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 1.0, "original_max_position_embeddings": 8192}),
    "linear": (64, 1e4, 8192, {"rope_type": "linear", "factor": 2.5}),
    "longrope": (64, 1e4, 131072, {"rope_type": "longrope", "factor": 32.0, **LONG,
                 "original_max_position_embeddings": 4096}),
}  # fmt: skip
RENAMED = {
    "rope_type": "scaling", "original_max_position_embeddings": "original_max_seq_len", "short_factor": "short_factors",
    "long_factor": "long_factors",
}  # fmt: skip


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", PUBLISHED)
def test_frequencies_of_published_models(name: str, fraction: float) -> None:
    transformers = pytest.importorskip("transformers")
    functions = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    width, theta, length, scaling = PUBLISHED[name]
    head_dim = round(width / fraction)
    theirs = transformers.LlamaConfig(
        head_dim=head_dim, max_position_embeddings=length,
        rope_parameters={"rope_theta": theta, "partial_rotary_factor": fraction, **scaling},
    )  # fmt: skip
    fields = {RENAMED.get(k, k): tuple(v) if isinstance(v, list) else v for k, v in scaling.items()}
    rope = RopeConfig(**fields, fraction=fraction)
    config = ModelConfig(head_dim=head_dim, max_seq_len=length, rope_theta=theta, rope=rope)
    for seq_len in (10, 4096, 4097):
        want_P, want_factor = functions[scaling["rope_type"]](theirs, torch.device("cpu"), seq_len=seq_len)
        got_P, factor = rotary_frequencies(config, seq_len)
        assert factor == pytest.approx(want_factor, rel=1e-12)
        torch.testing.assert_close(got_P, want_P, rtol=3e-7, atol=0)
        assert got_P.dtype == torch.float32


def test_unscaled_frequencies_have_the_last_bit_of_transformers() -> None:
    for theta in (1e4, 5e5, 1e6):
        got_P, factor = rotary_frequencies(ModelConfig(head_dim=128, rope_theta=theta), 1)
        assert torch.equal(got_P, 1.0 / theta ** (torch.arange(0, 128, 2).float() / 128))
        assert factor == 1.0


def test_phimoe_has_an_mscale_for_each_length() -> None:
    rope = RopeConfig(
        scaling="longrope", short_factors=(1.0, 2.0), long_factors=(3.0, 4.0), original_max_seq_len=8, short_mscale=1.2,
        long_mscale=1.3, attention_factor=7.0, factor=4.0,
    )  # fmt: skip
    config = ModelConfig(head_dim=4, max_seq_len=32, rope=rope, rope_theta=100.0)
    for seq_len, factors, mscale in ((8, [1.0, 2.0], 1.2), (9, [3.0, 4.0], 1.3)):
        frequencies_P, factor = rotary_frequencies(config, seq_len)
        torch.testing.assert_close(frequencies_P, torch.tensor([1.0, 0.1]) / torch.tensor(factors))
        assert factor == mscale
        cos_SP, sin_SP, _ = position_tables(torch.tensor([0, 3]), config, seq_len)
        torch.testing.assert_close(cos_SP[0], torch.full((2,), mscale))
        torch.testing.assert_close(sin_SP[1], mscale * torch.sin(3 * frequencies_P))


def test_mscale() -> None:
    assert yarn_mscale(1.0) == yarn_mscale(0.5) == 1.0
    assert yarn_mscale(40.0, 0.707) == pytest.approx(1 + 0.0707 * math.log(40))


def turned(x_BSNH: Tensor, frequencies_P: Tensor, *, interleaved: bool) -> Tensor:
    """Each pair is a complex number, turned by position * frequency."""
    width = 2 * len(frequencies_P)
    x, rest = x_BSNH[..., :width].double(), x_BSNH[..., width:].double()
    pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).transpose(-1, -2)
    angles_SP = torch.arange(x.shape[1]).double().unsqueeze(1) * frequencies_P.double()
    y = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles_SP), angles_SP).unsqueeze(1)
    y = torch.view_as_real(y)
    y = y.flatten(-2) if interleaved else y.transpose(-1, -2).flatten(-2)
    return torch.cat([y, rest], dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("pairs", [1, 3, 4])
def test_rotation(pairs: int, interleaved: bool, dtype: torch.dtype) -> None:
    x = torch.randn(2, 50, 3, 8).to(dtype)
    frequencies_P = torch.rand(pairs)
    cos, sin = rotary_tables(torch.arange(50), frequencies_P)
    got = apply_rotary(x, cos, sin, interleaved=interleaved)
    assert got.dtype == dtype
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert relative_error(got.double(), turned(x, frequencies_P, interleaved=interleaved)) <= tolerance
    assert torch.equal(got[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope": RopeConfig(fraction=0.6), "head_dim": 10}, "model.rope.fraction is 0.6: must be so that an even"),
        ({"rope": RopeConfig(fraction=0.1), "head_dim": 10}, "model.rope.fraction is 0.1: must be so that an even"),
        ({"rope": RopeConfig(scaling="longrope", short_factors=(1.0,), long_factors=(1.0,))}, "must be 32 numbers"),
        (
            {"rope": RopeConfig(fraction=0.5), "latent": LatentAttentionConfig(kv_lora_rank=8), "qk_norm": "none"},
            "model.rope.fraction is 0.5: must be 1.0 with latent attention",
        ),
    ],
)
def test_what_the_config_refuses(changes: dict[str, Any], message: str) -> None:
    if "0.6" in message:
        assert ModelConfig(**changes).rotary_dim == 6
        changes["head_dim"] = 12  # of which 7 would be rotated
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": "yarn", "factor": 0.5}, "model.rope.factor is 0.5: must be at least 1"),
        (
            {"scaling": "longrope", "short_factors": (0.0,), "long_factors": (1.0,)},
            "model.rope.short_factors is (0.0,)",
        ),
        ({"scaling": "longrope"}, "model.rope.long_factors is (): must be as many"),
        ({"scaling": "llama3", "low_freq_factor": 4.5}, "model.rope.low_freq_factor is 4.5: must be at most"),
        ({"fraction": 0.0}, "model.rope.fraction is 0.0: must be in (0, 1]"),
        ({"scaling": "ntk"}, "model.rope.scaling is 'ntk': must be one of none, linear"),
    ],
)
def test_what_the_rope_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RopeConfig(**changes)
    assert message in str(caught.value)
