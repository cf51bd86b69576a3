"""Decoding from a trained model."""

from dmoe.generate.decode import generate_tokens, load_run
from dmoe.generate.sampling import sample_token

__all__ = ["generate_tokens", "load_run", "sample_token"]
