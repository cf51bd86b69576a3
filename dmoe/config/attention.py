"""Attention beyond grouped queries: latent projections, and rotary embeddings for longer texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dmoe.config.checks import require, require_not_negative, require_positive, require_types


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How rotary frequencies differ from theta^(-2i/H)."""

    scaling: Literal["none", "linear", "yarn", "llama3", "longrope"] = "none"
    """Scaling of the frequencies beyond the length of pre-training: positions divided by `factor`; YaRN
    (arXiv:2309.00071); Llama 3.1's, by wavelength; or LongRoPE's factors of each frequency (arXiv:2402.13753)."""
    factor: float = 1.0
    """Length now over length in pre-training."""
    original_max_seq_len: int = 0
    """Length in pre-training; 0: model.max_seq_len."""
    interleaved: bool = False
    """Rotate pairs (2i, 2i + 1) of a head (DeepSeek, Llama 4) in place of (i, i + H/2)."""
    fraction: float = 1.0
    """Part of a head that is rotated, its first dimensions; the rest carries no position."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths above original length / this are scaled in full."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths below original length / this are not scaled."""
    beta_fast: float = 32.0
    """yarn: dimensions that rotate more often than this over the original length are not scaled."""
    beta_slow: float = 1.0
    """yarn: dimensions that rotate less often than this are scaled in full."""
    truncate: bool = True
    """yarn: round the borders between those dimensions outwards to whole numbers."""
    attention_factor: float = 0.0
    """yarn and longrope: factor on cos and sin; 0: by the paper's formula from `factor`, or from the mscales where both
    are set. See `dmoe.models.rope.rotary_frequencies`."""
    mscale: float = 0.0
    """yarn of DeepSeek: enters the factor on cos and sin as mscale over mscale_all_dim."""
    mscale_all_dim: float = 0.0
    """yarn of DeepSeek: also multiplies the scale of latent attention by (0.1 * this * ln(factor) + 1)^2."""
    short_factors: tuple[float, ...] = ()
    """longrope: divisors of the frequencies up to the original length, one for each."""
    long_factors: tuple[float, ...] = ()
    """longrope: the same for longer sequences: all positions of a sequence turn by these, the first too."""
    short_mscale: float = 0.0
    """longrope of PhiMoE: factor on cos and sin up to the original length; 0: `attention_factor`."""
    long_mscale: float = 0.0
    """longrope of PhiMoE: the same for longer sequences."""

    def __post_init__(self) -> None:
        require_types(self, "model.rope")
        require_positive(self, "model.rope", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
        require_not_negative(
            self, "model.rope", "original_max_seq_len", "attention_factor", "mscale", "mscale_all_dim", "short_mscale",
            "long_mscale",
        )  # fmt: skip
        require(0 < self.fraction <= 1, "model.rope.fraction", self.fraction, "in (0, 1]")
        if self.scaling != "none":
            require(
                self.factor >= 1,
                "model.rope.factor",
                self.factor,
                f'at least 1 with model.rope.scaling "{self.scaling}"',
            )
        if self.scaling == "longrope":
            for name in ("short_factors", "long_factors"):
                values = getattr(self, name)
                require(all(x > 0 for x in values), f"model.rope.{name}", values, "numbers greater than 0")
            require(
                len(self.short_factors) == len(self.long_factors) > 0,
                "model.rope.long_factors", self.long_factors,
                f"as many as model.rope.short_factors ({len(self.short_factors)}), and at least one",
            )  # fmt: skip
        if self.scaling == "llama3":
            require(
                self.low_freq_factor <= self.high_freq_factor,
                "model.rope.low_freq_factor", self.low_freq_factor,
                f"at most model.rope.high_freq_factor ({self.high_freq_factor})",
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1): keys and values from a narrow latent.

    Each query and key head is `qk_nope_head_dim` dimensions without a position and `qk_rope_head_dim` with one, which
    all key heads share.
    """

    kv_lora_rank: int = 0
    """Width of the latent of keys and values. 0: no latent attention."""
    q_lora_rank: int = 0
    """Width of the latent of queries. 0: projected directly."""
    qk_nope_head_dim: int = 128
    """Dimensions of a query or key head without a position."""
    qk_rope_head_dim: int = 64
    """Dimensions of a query or key head with one."""
    v_head_dim: int = 128
    """Width of a value head."""

    def __post_init__(self) -> None:
        require_types(self, "model.latent")
        require_not_negative(self, "model.latent", "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim")
        require_positive(self, "model.latent", "qk_rope_head_dim", "v_head_dim")
        require(self.qk_rope_head_dim % 2 == 0, "model.latent.qk_rope_head_dim", self.qk_rope_head_dim, "even")
        if self.q_lora_rank:
            require(
                self.kv_lora_rank > 0, "model.latent.kv_lora_rank", 0, "greater than 0 with model.latent.q_lora_rank"
            )
