"""Validation in bits per byte: comparable across tokenisers and with a compressor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from dmoe.data import Dataset, sequential_windows
from dmoe.ops.regions import region
from dmoe.train.engine import Engine


@dataclass(frozen=True)
class EvalResult:
    """Loss on held-out text."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Bits the model needs per byte of text. End-of-document tokens cost bits and count no byte."""
    whole: bool
    """Whether the whole held-out text was read."""


def evaluate(engine: Engine, data: Dataset, *, max_batches: int | None = None) -> EvalResult:
    """Read the held-out text in consecutive windows of `train.seq_len`; every token but the first is predicted once.

    Collective: all ranks get the same result.

    Args:
        max_batches: stop after that many micro-batches, taken evenly from the whole text; None reads all of it.
    """
    tokens, token_bytes, train = data.val.tokens, data.tokenizer.token_bytes(), engine.train
    windows = sequential_windows(len(tokens), train.seq_len)
    size = train.micro_batch_size
    batches = [windows[i : i + size] for i in range(0, len(windows), size)]
    whole = max_batches is None or max_batches >= len(batches)
    if not whole:
        assert max_batches is not None
        batches = [batches[i * len(batches) // max_batches] for i in range(max_batches)]
    nats, num_tokens, num_bytes = 0.0, 0, 0
    for batch in batches:
        # Windows without targets fill the last batch up, for ranks that would have nothing and stages of fixed shape.
        padded = batch + [(0, 0)] * (size - len(batch)) if engine.mesh is not None else batch
        starts, lengths = np.array(padded).T
        with region("forward"):
            nats += engine.evaluate(engine.batch(tokens, starts, lengths)).item()
        for start, length in batch:
            num_tokens += length
            num_bytes += int(token_bytes[tokens[start + 1 : start + length + 1]].sum())
    return EvalResult(nats / num_tokens, nats / math.log(2) / max(num_bytes, 1), whole)
