"""Validation in bits per byte: comparable across tokenisers and with a compressor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dmoe.config import TrainConfig
from dmoe.data import Dataset, sequential_windows
from dmoe.models import Decoder
from dmoe.train.device import autocast


@dataclass(frozen=True)
class EvalResult:
    """Loss on held-out text."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Bits the model needs per byte of text. End-of-document tokens cost bits and count no byte."""
    whole: bool
    """Whether the whole held-out text was read."""


@torch.no_grad()
def evaluate(
    model: Decoder, data: Dataset, config: TrainConfig, device: torch.device, *, max_batches: int | None = None
) -> EvalResult:
    """Read the held-out text in consecutive windows of `train.seq_len`; every token but the first is predicted once.

    Args:
        max_batches: stop after that many micro-batches, taken evenly from the whole text; None reads all of it.
    """
    tokens, token_bytes = data.val.tokens, data.tokenizer.token_bytes()
    windows = sequential_windows(len(tokens), config.seq_len)
    batches = [windows[i : i + config.micro_batch_size] for i in range(0, len(windows), config.micro_batch_size)]
    whole = max_batches is None or max_batches >= len(batches)
    if not whole:
        assert max_batches is not None
        batches = [batches[i * len(batches) // max_batches] for i in range(max_batches)]
    was_training = model.training
    model.eval()
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for batch in batches:
        inputs, targets = _padded_batch(tokens, batch, config.seq_len)
        with autocast(config, device):
            logits = model(torch.from_numpy(inputs).to(device))
        flat = torch.from_numpy(targets).to(device).flatten()
        # Padded targets are -1 and cost nothing.
        nats += F.cross_entropy(logits.flatten(0, 1).float(), flat, ignore_index=-1, reduction="sum").item()
        real = targets[targets >= 0]
        num_tokens += real.size
        num_bytes += int(token_bytes[real].sum())
    model.train(was_training)
    return EvalResult(nats / num_tokens, nats / math.log(2) / max(num_bytes, 1), whole)


def _padded_batch(tokens: np.ndarray, windows: list[tuple[int, int]], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    inputs = np.zeros((len(windows), seq_len), dtype=np.int64)
    targets = np.full((len(windows), seq_len), -1, dtype=np.int64)
    for row, (start, length) in enumerate(windows):
        inputs[row, :length] = tokens[start : start + length]
        targets[row, :length] = tokens[start + 1 : start + length + 1]
    return inputs, targets
