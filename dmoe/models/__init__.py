"""Decoder-only language models and their presets."""

from dmoe.models.attention import Attention
from dmoe.models.decoder import Decoder, DecoderLayer, count_parameters
from dmoe.models.latent import LatentAttention
from dmoe.models.presets import PRESETS, get_preset

__all__ = ["PRESETS", "Attention", "Decoder", "DecoderLayer", "LatentAttention", "count_parameters", "get_preset"]
