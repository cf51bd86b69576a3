"""`RoutingSummary`: what is kept of how a piece of text was routed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

HISTOGRAM_BINS = 20
TOKENS_LISTED = 20


@dataclass(frozen=True)
class RoutingSummary:
    """Routing of T tokens by L mixture-of-experts layers of E experts.

    Legend: L layers, T tokens without padding, E experts, K picks a token (with routing "expert_choice" the most that
    any token got), B bins, N tokens listed an expert. Probabilities are the router's scores divided by their sum over
    the experts, without the bias of the choice. Picks are counted before any are dropped. Statistics of no token are 0.
    """

    layers: Array
    """int64 [L]: the model's index of each layer."""
    num_tokens: int
    top_k: int
    """Picks a token by the config; with "expert_choice" the mean."""
    load_LE: Array
    """float64: share of the layer's picks."""
    prob_LE: Array
    """float64: mean probability."""
    entropy_L: Array
    """float64: mean entropy of the probabilities in nats; ln E is an undecided router."""
    confidence_L: Array
    """float64: mean of the largest probability of a token."""
    margin_L: Array
    """float64: mean of the top_k-th largest probability less the next one; 0 if every expert is picked."""
    confidence_hist_LB: Array
    """float64 [L, 20]: share of the tokens by their largest probability, in equal bins on [0, 1]."""
    dropped_L: Array
    """float64: share of the picks over an expert's capacity."""
    coactivation_LEE: Array
    """float32: share of the tokens that picked both experts; on the diagonal, that picked this one."""
    token_ids_LEN: Array
    """int32 [L, E, 20]: the tokens that each expert gets more often than their share, by falling lift; -1: no more."""
    token_lift_LEN: Array
    """float32: share of the token in the expert's picks over its share in the text; 0: no more."""
    token_count_LEN: Array
    """int32: how often the expert was picked for the token."""
    picks_LTK: Array
    """int16 or int32: the experts of each token, rising; E where there is none."""
    text_hash: str
    """sha256 of the token ids: summaries of the same text have the same."""
    step: int
    """Optimiser step of the weights."""
    name: str
    """Of the run or checkpoint."""

    @property
    def num_experts(self) -> int:
        return int(self.load_LE.shape[1])

    @property
    def dead_L(self) -> Array:
        """int64: experts of each layer that were never picked."""
        return np.asarray((self.load_LE == 0).sum(axis=1))

    @property
    def max_over_mean_L(self) -> Array:
        """float64: load of the busiest expert over the mean load."""
        return np.asarray(self.load_LE.max(axis=1, initial=0.0) * self.num_experts)

    def coactivation_lift(self, layer: int) -> Array:
        """float64 [E, E]: how much more often than by chance two experts are picked together in the layer at
        position `layer`: P(both) / (P(one) P(other)). 1 is chance; NaN on the diagonal and for experts never picked.

        With K picks out of E two experts with equal load meet (K - 1) E / (K (E - 1)) times what independent picks
        would make of it, which is what chance means here. NaN everywhere for K = 1.
        """
        together_EE = self.coactivation_LEE[layer].astype(np.float64)
        share_E = np.diagonal(together_EE)
        experts, picks = self.num_experts, share_E.sum()
        chance = (picks - 1) * experts / (picks * (experts - 1)) if picks > 1 and experts > 1 else 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            lift_EE = together_EE / (np.outer(share_E, share_E) * chance)
        lift_EE[~np.isfinite(lift_EE)] = np.nan
        np.fill_diagonal(lift_EE, np.nan)
        return lift_EE
