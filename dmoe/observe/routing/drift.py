"""How far the routing of the same text moved from one checkpoint to another.

Legend: L layers, T tokens, K picks a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dmoe.config import require
from dmoe.observe.routing.likeness import likeness
from dmoe.observe.routing.summary import Array, RoutingSummary


@dataclass(frozen=True)
class Drift:
    """Two routings compared, layer by layer, float64 [L]."""

    layers: Array
    """int64: the model's index of each layer."""
    equal_picks_L: Array
    """Share of a token's picks that both have, mean over the tokens; 1 for no drift."""
    equal_sets_L: Array
    """Share of the tokens whose picks are all the same."""
    load_divergence_L: Array
    """Jensen-Shannon divergence of the two loads in bits: 0 for equal loads, 1 for loads on different experts."""
    likeness_L: Array
    """`likeness` of the two: 1 also if experts were only renumbered; NaN where all tokens are treated the same."""


def drift(a: RoutingSummary, b: RoutingSummary) -> Drift:
    """Compare two summaries of the same text.

    Raises:
        ConfigError: another text, other layers, or another number of experts.
    """
    require(a.text_hash == b.text_hash, "text of the second summary", b.name, "that of the first, in the same tokens")
    require(
        np.array_equal(a.layers, b.layers), "layers of the second summary", b.layers.tolist(), f"{a.layers.tolist()}"
    )
    require(a.num_experts == b.num_experts, "experts of the second summary", b.num_experts, f"{a.num_experts}")
    experts = a.num_experts
    shared = [_equal(p, q, experts) for p, q in zip(a.picks_LTK, b.picks_LTK)]
    alike = [likeness([p, q], [experts, experts])[0, 1] for p, q in zip(a.picks_LTK, b.picks_LTK)]
    return Drift(
        layers=a.layers,
        equal_picks_L=np.array([picks for picks, _ in shared]),
        equal_sets_L=np.array([sets for _, sets in shared]),
        load_divergence_L=np.array([jensen_shannon(p, q) for p, q in zip(a.load_LE, b.load_LE)]),
        likeness_L=np.array(alike),
    )


def jensen_shannon(p_E: Array, q_E: Array) -> float:
    """Jensen-Shannon divergence of two distributions in bits (Lin, "Divergence measures based on the Shannon
    entropy", IEEE Trans. Inf. Theory 37, 1991, eq. 4.1)."""

    def divergence(x_E: Array, mean_E: Array) -> float:
        positive = x_E > 0
        return float((x_E[positive] * np.log2(x_E[positive] / mean_E[positive])).sum())

    mean_E = (p_E + q_E) / 2
    return max(0.0, (divergence(p_E, mean_E) + divergence(q_E, mean_E)) / 2)


def _equal(a_TK: Array, b_TK: Array, num_experts: int) -> tuple[float, float]:
    """Mean share of equal picks, and share of equal sets; of no token 1 and 1."""
    if not len(a_TK):
        return 1.0, 1.0
    # A pick is in both if it is among the other's; E, no expert, counts for none.
    both_T = np.zeros(len(a_TK), dtype=np.int64)
    for k in range(a_TK.shape[1]):
        pick_T1 = a_TK[:, k : k + 1]
        both_T += ((pick_T1 == b_TK) & (pick_T1 < num_experts)).any(axis=1)
    most_T = np.maximum((a_TK < num_experts).sum(axis=1), (b_TK < num_experts).sum(axis=1))
    share_T = np.where(most_T > 0, both_T / np.maximum(most_T, 1), 1.0)
    return float(share_T.mean()), float((both_T == most_T).mean())
