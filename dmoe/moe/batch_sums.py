"""Sums over all tokens of a batch that is spread over ranks, for losses and statistics that need the whole of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.moe.router import Routing
from dmoe.ops.balancing import normalized_scores, sums_by_sequence
from dmoe.ops.collectives import finish_all_reduce, start_all_reduce
from dmoe.ops.routing import count_tokens_by_sequence

SCALARS = ("aux_loss", "z_loss", "router_entropy", "confidence", "dropped", "seq_aux_loss", "global_aux_loss")


@dataclass(frozen=True)
class BatchGroups:
    """How the tokens of a batch are spread over ranks. None: they are all here."""

    batch: dist.ProcessGroup | None = None
    """Ranks that share one batch."""
    sequence: dist.ProcessGroup | None = None
    """Of these, the ranks that hold parts of the same sequences."""


@dataclass(frozen=True)
class SequenceSums:
    """Counts and sums of each of B sequences, over the ranks that hold parts of them."""

    counts_BE: Tensor
    """fp64: picks of each expert."""
    tokens_B: Tensor
    """fp64: tokens without padding."""
    losses_B: Tensor
    """fp64: load-balancing loss of each sequence; 0 where there is no token."""


def probabilities(routing: Routing) -> Tensor:
    """[T, E]: scores that sum to 1 over the experts, and to 0 for padding."""
    probs_TE = normalized_scores(routing.scores_TE)
    return probs_TE if routing.valid_T is None else probs_TE * routing.valid_T.unsqueeze(1)


def squared_logsumexp(routing: Routing) -> Tensor:
    """Sum over the tokens of logsumexp(logits)^2, the z-loss of all of them."""
    z_T = routing.logits_TE.logsumexp(dim=-1).square()
    return z_T.sum() if routing.valid_T is None else (z_T * routing.valid_T).sum()


def decisiveness(probs_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the tokens of the entropy of their probabilities in nats, and of the largest of them."""
    return torch.special.entr(probs_TE).sum(), probs_TE.amax(dim=-1).sum()


@torch.no_grad()
def sequence_sums(routing: Routing, num_sequences: int, group: dist.ProcessGroup | None) -> SequenceSums:
    """Sums by sequence; the T rows of a rank are its parts of `num_sequences` sequences, one after the other."""
    num_tokens, num_experts = routing.scores_TE.shape
    counts_BE = count_tokens_by_sequence(routing.ids_before_drop, num_experts, num_sequences).double()
    prob_sums_BE = sums_by_sequence(probabilities(routing), num_sequences).double()
    if routing.valid_T is None:
        tokens_B = counts_BE.new_full((num_sequences,), num_tokens // max(num_sequences, 1))
    else:
        tokens_B = routing.valid_T.view(num_sequences, -1).sum(dim=1).double()
    sums = torch.cat([counts_BE, prob_sums_BE, tokens_B.unsqueeze(1)], dim=1)
    if group is not None:
        sums = finish_all_reduce(start_all_reduce(sums, group))
    counts_BE, prob_sums_BE, tokens_B1 = sums.split([num_experts, num_experts, 1], dim=1)
    tokens_B = tokens_B1.squeeze(1)
    share_BE = counts_BE / counts_BE.sum(dim=1, keepdim=True).clamp_min(1)
    losses_B = num_experts * (share_BE * prob_sums_BE).sum(dim=1) / tokens_B.clamp_min(1)
    return SequenceSums(counts_BE, tokens_B, losses_B)


def start_batch_sums(
    routing: Routing, groups: BatchGroups, sequences: SequenceSums | None = None, step_counts_E: Tensor | None = None
) -> BatchSums:
    """Sum over the tokens of every rank of a batch; the reduction is under way.

    Args:
        sequences: of `sequence_sums`, if the loss of each sequence is asked for.
        step_counts_E: picks of the optimiser step's earlier batches, if its loss is.
    """
    num_tokens, num_experts = routing.scores_TE.shape
    with torch.no_grad():
        probs_TE = probabilities(routing)
        z_sum, (entropy_sum, confidence_sum) = squared_logsumexp(routing), decisiveness(probs_TE)
        zero = torch.zeros_like(z_sum, dtype=torch.float64)
        valid = zero + (num_tokens if routing.valid_T is None else routing.valid_T.sum())
        dropped = zero if routing.dropped is None else routing.dropped
        losses, num_sequences = zero, zero
        if sequences is not None:
            # Every rank of a sequence has the loss of all of it. Sequences of padding alone are none.
            copies = 1 if groups.sequence is None else groups.sequence.size()
            losses, num_sequences = sequences.losses_B.sum() / copies, (sequences.tokens_B > 0).sum() / copies
        # One message, in fp64 so that counts stay exact.
        scalars = [x.double() for x in (z_sum, entropy_sum, confidence_sum, dropped, losses, num_sequences, valid)]
        sums = torch.cat([routing.tokens_per_expert().double(), probs_TE.sum(dim=0).double(), torch.stack(scalars)])
        if groups.batch is not None:
            sums = start_all_reduce(sums, groups.batch)
    return BatchSums(sums, num_experts, step_counts_E, under_way=groups.batch is not None)


class BatchSums:
    """Counts and sums of one forward of one layer; its properties wait for the reduction."""

    def __init__(self, sums: Tensor, num_experts: int, step_counts_E: Tensor | None, *, under_way: bool) -> None:
        self._sums, self.num_experts, self._step_counts_E, self._under_way = sums, num_experts, step_counts_E, under_way

    def wait(self) -> None:
        """Finish the reduction; does nothing the second time."""
        if self._under_way:
            self._sums, self._under_way = finish_all_reduce(self._sums), False

    @property
    def num_tokens(self) -> Tensor:
        """Tokens of the batch, at least 1."""
        self.wait()
        return self._sums[-1].clamp_min(1)

    @property
    def num_sequences(self) -> Tensor:
        """Sequences of the batch that have tokens, at least 1; only with sums by sequence."""
        self.wait()
        return self._sums[-2].clamp_min(1)

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """Picks of each expert, fp64."""
        self.wait()
        return self._sums[: self.num_experts]

    @property
    def load_E(self) -> Tensor:
        """Share of each expert in the picks of the batch."""
        return _shares(self.tokens_per_expert_E)

    @property
    def step_load_E(self) -> Tensor:
        """The same for the optimiser step up to and with this batch."""
        counts_E = self.tokens_per_expert_E
        return _shares(counts_E if self._step_counts_E is None else counts_E + self._step_counts_E)

    @property
    def flat(self) -> Tensor:
        """All of it in one fp64 tensor, for `scalars_of`: counts [E], sums of probabilities [E], the other sums, and
        the counts of the step up to and with this batch [E]."""
        counts_E, step_E = self.tokens_per_expert_E, self._step_counts_E
        return torch.cat([self._sums, counts_E if step_E is None else counts_E + step_E])


NUM_SUMS = 7
"""Sums in a message beside those of each expert."""


def scalars_of(flat: Tensor, num_experts: int) -> Tensor:
    """[..., S] fp64, in the order of `SCALARS`, from `BatchSums.flat` of one or more layers or batches, [..., 3E + 7].
    Losses are without their coefficients."""
    counts, prob_sums, sums, step_counts = flat.split([num_experts, num_experts, NUM_SUMS, num_experts], dim=-1)
    z_sum, entropy_sum, confidence_sum, dropped, sequence_losses, num_sequences, num_tokens = sums.unbind(dim=-1)
    num_tokens = num_tokens.clamp_min(1)
    aux_loss, step_loss = (
        num_experts * (c * prob_sums).sum(dim=-1) / (c.sum(dim=-1).clamp_min(1) * num_tokens)
        for c in (counts, step_counts)
    )
    means = (z_sum / num_tokens, entropy_sum / num_tokens, confidence_sum / num_tokens)
    return torch.stack([aux_loss, *means, dropped, sequence_losses / num_sequences.clamp_min(1), step_loss], dim=-1)


def _shares(counts_E: Tensor) -> Tensor:
    return counts_E / counts_E.sum().clamp_min(1)
