"""How far apart two models are on a text: logits, distributions, perplexities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dmoe.models import Decoder


@dataclass(frozen=True)
class Comparison:
    """Of a model with a reference, over the positions of a text."""

    tokens: int
    max_difference: float
    """Largest difference of logits."""
    kl: float
    """Mean over positions of KL(reference || model) of the next token, in nats."""
    top1: float
    """Share of positions at which both have the same most likely token."""
    reference_perplexity: float
    """exp of the mean cross entropy of the text's next tokens."""
    perplexity: float

    def __str__(self) -> str:
        return (
            f"on {self.tokens} tokens: logits differ by at most {self.max_difference:.3g}, KL {self.kl:.3g} nats, "
            f"top-1 agreement {self.top1:.2%}, perplexity {self.reference_perplexity:.4f} before and "
            f"{self.perplexity:.4f} after"
        )


@torch.no_grad()
def text_logits(model: Decoder, ids_BS: Tensor) -> list[Tensor]:
    """fp32 or fp64 logits [S, V] on the CPU of each of B sequences, computed one after the other in eval mode."""
    training, device = model.training, model.embed_tokens.weight.device
    model.eval()
    logits = [model(ids_S.unsqueeze(0).to(device))[0] for ids_S in ids_BS]
    model.train(training)
    return [x.cpu().to(torch.promote_types(x.dtype, torch.float32)) for x in logits]


def compare(reference: list[Tensor], other: list[Tensor], ids_BS: Tensor) -> Comparison:
    """Compare the `text_logits` of two models for token ids [B, S].

    Both are lists, so that the second model need not be in memory together with the first.
    """
    difference = kl = agreed = nll_reference = nll = 0.0
    for logits_SV, other_SV, ids_S in zip(reference, other, ids_BS):
        log_p_SV, log_q_SV = (x.double().log_softmax(dim=-1) for x in (logits_SV, other_SV))
        difference = max(difference, (logits_SV - other_SV).abs().max().item())
        kl += (log_p_SV.exp() * (log_p_SV - log_q_SV)).sum().item()
        agreed += (logits_SV.argmax(dim=-1) == other_SV.argmax(dim=-1)).sum().item()
        nexts = ids_S[1:].unsqueeze(1)
        nll_reference -= log_p_SV[:-1].gather(1, nexts).sum().item()
        nll -= log_q_SV[:-1].gather(1, nexts).sum().item()
    tokens, predicted = ids_BS.numel(), ids_BS[:, 1:].numel()
    perplexities = (math.exp(total / predicted) for total in (nll_reference, nll))
    return Comparison(tokens, difference, kl / tokens, agreed / tokens, *perplexities)
