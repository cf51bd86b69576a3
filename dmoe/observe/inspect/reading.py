"""A model reads a text while its routers are listened to.

Legend: T tokens, L mixture-of-experts layers, B sequences, S tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import require
from dmoe.observe.routing import RoutingAccumulator, RoutingSummary, capture
from dmoe.observe.routing.likeness import likeness
from dmoe.observe.routing.specialization import specialization
from dmoe.observe.routing.summary import Array
from dmoe.observe.routing.tokens import text_of


@dataclass(frozen=True)
class Reading:
    """What a model made of a text."""

    summary: RoutingSummary
    token_ids_T: Array
    """int32: the text, in order."""
    loss: float
    """Nats per predicted token; NaN if none was."""
    predicted_P: Array
    """int64: positions that were predicted: all but the first of each sequence."""
    specialization_L: Array
    """float64: how far a token's id decides its experts, see `dmoe.observe.routing.specialization`."""
    likeness_LL: Array
    """float64: how alike two layers group the tokens, see `dmoe.observe.routing.likeness`."""


@torch.no_grad()
def read_text(
    model: nn.Module,
    token_ids: Array,
    *,
    seq_len: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    step: int = 0,
    name: str = "",
    listed: int = 20,
    progress: Callable[[int], None] = lambda done: None,
) -> Reading:
    """Read a text in sequences that follow each other, none of which sees another.

    Args:
        model: in evaluation mode; maps token ids [B, S] to logits [B, S, V].
        token_ids: int [T], at least one.
        seq_len: tokens of a sequence, at least 2; the last one may be shorter.
        batch_size: sequences at a time. Logits take 4 * batch_size * seq_len * V bytes.
        listed: tokens listed for each expert.
        progress: called with the number of tokens read so far.

    Raises:
        ConfigError: no token, or a size out of range; a model without MoE layers, or of which they differ in size.
    """
    require(len(token_ids) > 0, "tokens of the text", len(token_ids), "at least 1")
    require(seq_len >= 2, "seq_len", seq_len, "at least 2")
    require(batch_size >= 1, "batch_size", batch_size, "at least 1")
    accumulator, ids_T = RoutingAccumulator.of(model), torch.from_numpy(np.asarray(token_ids, dtype=np.int64))
    nats, done = 0.0, 0
    with capture(model) as captured:
        for ids_BS in _batches(ids_T, seq_len, batch_size):
            logits_BSV = model(ids_BS.to(device))
            nats += _cross_entropy(logits_BSV, ids_BS.to(device))
            accumulator.add_layers(captured.take(), ids_BS.flatten())
            done += ids_BS.numel()
            progress(done)
    positions_T = np.arange(len(ids_T))
    predicted_P = positions_T[positions_T % seq_len != 0]
    summary = accumulator.summary(step=step, name=name, listed=listed)
    text, experts = text_of(summary_tokens := accumulator.token_ids()), summary.num_experts
    return Reading(
        summary=summary,
        token_ids_T=summary_tokens,
        loss=nats / len(predicted_P) if len(predicted_P) else float("nan"),
        predicted_P=predicted_P,
        specialization_L=np.array([specialization(text, picks_TK, experts) for picks_TK in summary.picks_LTK]),
        likeness_LL=likeness(list(summary.picks_LTK), [experts] * len(summary.layers)),
    )


def _batches(ids_T: Tensor, seq_len: int, batch_size: int) -> Iterator[Tensor]:
    """[B, S] each: the whole sequences, then the rest as one that is shorter."""
    whole = len(ids_T) // seq_len
    if whole:
        yield from ids_T[: whole * seq_len].view(whole, seq_len).split(batch_size)
    if len(ids_T) % seq_len:
        yield ids_T[whole * seq_len :].unsqueeze(0)


def _cross_entropy(logits_BSV: Tensor, ids_BS: Tensor) -> float:
    """Nats over the positions that have a predecessor; a sequence at a time, so that fp32 copies stay small."""
    nats = 0.0
    for logits_SV, ids_S in zip(logits_BSV, ids_BS):
        if len(ids_S) > 1:
            logits_SV = logits_SV[:-1] if logits_SV.dtype == torch.float64 else logits_SV[:-1].float()
            nats += F.cross_entropy(logits_SV, ids_S[1:], reduction="sum").item()
    return nats
