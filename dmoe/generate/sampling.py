"""From logits to a next token."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_token(
    logits_V: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> int:
    """The next token id.

    Args:
        temperature: 0 takes the most likely token.
        top_k: sample among the k most likely tokens; 0: all.
        top_p: sample among the most likely tokens whose probabilities first reach p (Holtzman et al.,
            arXiv:1904.09751). After top_k, as in transformers: p is a share of what top_k left.
    """
    if temperature == 0:
        return int(logits_V.argmax())
    probs_V, ids_V = (logits_V.float() / temperature).softmax(dim=-1).sort(descending=True, stable=True)
    if top_k:
        probs_V, ids_V = probs_V[:top_k] / probs_V[:top_k].sum(), ids_V[:top_k]
    if top_p < 1:
        # a token stays if the ones before it have not reached p yet; the first always stays
        keep = probs_V.cumsum(dim=0) - probs_V < top_p
        probs_V = torch.where(keep, probs_V, 0.0)
    return int(ids_V[torch.multinomial(probs_V, 1, generator=generator)])
