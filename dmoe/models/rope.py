"""Rotary position embedding (Su et al., "RoFormer", arXiv:2104.09864) and its scalings for longer texts.

Legend: S sequence, N heads, H head width, P pairs of dimensions that are rotated (2P <= H).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dmoe.config import ModelConfig
from dmoe.config.attention import RopeConfig


class PositionTables(NamedTuple):
    """What attention needs of the positions of its queries and keys, alike in all layers."""

    cos_SP: Tensor
    sin_SP: Tensor
    temperature_S: Tensor | None
    """Factor on the queries of layers without a rotary embedding."""


def position_tables(positions_S: Tensor, config: ModelConfig, seq_len: int | None = None) -> PositionTables:
    """The tables of integer positions [S], in fp32.

    Args:
        seq_len: length of the whole sequence, which decides on the factors of LongRoPE. None: that of `positions_S`.
    """
    frequencies_P, factor = rotary_frequencies(config, seq_len or len(positions_S), positions_S.device)
    cos_SP, sin_SP = rotary_tables(positions_S, frequencies_P, factor)
    temperature_S = None
    if config.attention_temperature_scale:
        steps_S = torch.floor((positions_S.float() + 1) / config.attention_temperature_floor)
        temperature_S = torch.log1p(steps_S) * config.attention_temperature_scale + 1
    return PositionTables(cos_SP, sin_SP, temperature_S)


def rotary_tables(positions_S: Tensor, frequencies_P: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [S, P] of position * frequency in fp32, times `factor`."""
    angles_SP = positions_S.float().unsqueeze(1) * frequencies_P
    return angles_SP.cos() * factor, angles_SP.sin() * factor


def apply_rotary(x_BSNH: Tensor, cos_SP: Tensor, sin_SP: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate pairs among the first 2P dimensions of every head, the others stay; in fp32, fp64 for fp64.

    The pairs are (i, i + P), the layout of Hugging Face's Llama, or `interleaved` (2i, 2i + 1).
    """
    cos, sin = cos_SP.unsqueeze(1), sin_SP.unsqueeze(1)
    width = 2 * cos.shape[-1]
    rotated, rest = x_BSNH[..., :width], x_BSNH[..., width:]
    x = rotated if x_BSNH.dtype == torch.float64 else rotated.float()
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    y = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    y = y.to(x_BSNH.dtype)
    return torch.cat([y, rest], dim=-1) if rest.shape[-1] else y


def rotary_frequencies(config: ModelConfig, seq_len: int, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Radians a position [P] in fp32, and the factor on cos and sin.

    Without scaling theta^(-i/P) and 1. The factor of YaRN is m(f) = 0.1 ln f + 1 (arXiv:2309.00071, section 3.4), or in
    DeepSeek (0.1 mscale ln f + 1) / (0.1 mscale_all_dim ln f + 1); that of LongRoPE sqrt(1 + ln f / ln original length)
    (arXiv:2402.13753, section 3.2); with `attention_factor`, or the `short_mscale` and `long_mscale` of PhiMoE, that.
    """
    rope, width = config.rope, config.rotary_dim
    exponents_P = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    # As a power and its inverse: a last bit of a frequency is a degree at position 100,000.
    frequencies_P = 1.0 / config.rope_theta**exponents_P
    original = rope.original_max_seq_len or config.max_seq_len
    match rope.scaling:
        case "linear":
            return frequencies_P / rope.factor, 1.0
        case "llama3":
            return _by_wavelength(frequencies_P, rope, original), 1.0
        case "yarn":
            return _by_rotations(frequencies_P, config.rope_theta, rope, original), _yarn_factor(rope)
        case "longrope":
            longer = seq_len > original
            divisors_P = torch.tensor(rope.long_factors if longer else rope.short_factors)
            divisors_P = divisors_P.to(frequencies_P.device, non_blocking=True)  # nobody waits for the device
            return frequencies_P / divisors_P, _longrope_factor(rope, original, longer)
    return frequencies_P, 1.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 * mscale * ln(factor) + 1, and 1 without scaling."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _by_wavelength(frequencies_P: Tensor, rope: RopeConfig, original: int) -> Tensor:
    """Llama 3.1: frequencies that turn less than `low_freq_factor` times over the original length are divided by
    `factor`, those that turn more than `high_freq_factor` times are not, and those between by their turns."""
    turns_P = original * frequencies_P / (2 * math.pi)
    between = rope.high_freq_factor - rope.low_freq_factor
    kept_P = (turns_P - rope.low_freq_factor) / between if between else (turns_P > rope.low_freq_factor).float()
    return torch.lerp(frequencies_P / rope.factor, frequencies_P, kept_P.clamp(0, 1))


def _by_rotations(frequencies_P: Tensor, theta: float, rope: RopeConfig, original: int) -> Tensor:
    """YaRN (arXiv:2309.00071, section 3.2): pairs that turn more than `beta_fast` times over the original length keep
    their frequency, those that turn less than `beta_slow` times are divided by `factor`; linear between."""
    pairs = len(frequencies_P)

    def pair_that_turns(times: float) -> float:
        return pairs * math.log(original / (times * 2 * math.pi)) / math.log(theta)

    low, high = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    high += 0.001 if low == high else 0.0
    indices_P = torch.arange(pairs, device=frequencies_P.device, dtype=torch.float32)
    scaled_P = ((indices_P - low) / (high - low)).clamp(0, 1)
    return frequencies_P / rope.factor * scaled_P + frequencies_P * (1 - scaled_P)


def _yarn_factor(rope: RopeConfig) -> float:
    if rope.attention_factor:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor)


def _longrope_factor(rope: RopeConfig, original: int, longer: bool) -> float:
    chosen = (rope.long_mscale if longer else rope.short_mscale) or rope.attention_factor
    if chosen:
        return chosen
    return math.sqrt(1 + math.log(rope.factor) / math.log(original)) if rope.factor > 1 else 1.0
