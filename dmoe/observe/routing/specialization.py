"""How much a token's identity says about its experts.

Legend: T tokens, K picks a token, E experts.
"""

from __future__ import annotations

import numpy as np

from dmoe.observe.routing.summary import Array
from dmoe.observe.routing.tokens import Text, count_pairs


def specialization(text: Text, picks_TK: Array, num_experts: int, *, seed: int = 0) -> float:
    """Mutual information of a token's id and one of its picks, from 0 (by chance) to 1 (the id decides all picks).

    (I - I0) / (I1 - I0). I is the mutual information of the counts. I0 is that of the same picks after a shuffle of
    the tokens: what a finite text shows where there is no relation, as in the adjusted mutual information of Vinh et
    al., JMLR 11, 2010, with one drawn permutation in place of the mean over all. I1 is the most that it can be,
    H(expert) - mean ln K: a pick drawn from the K of a token is not known better. 0 where there is nothing to know:
    one expert, K = E, every token different, or the same picks for all.

    Args:
        text: of `text_of`.
        picks_TK: distinct expert ids; ids at or above `num_experts` are none.
        seed: of the shuffle.
    """
    picked_TK = picks_TK < num_experts
    if not picked_TK.any():
        return 0.0
    places_T = text.places_T
    load_E = np.bincount(picks_TK[picked_TK], minlength=num_experts) / picked_TK.sum()
    picks_T = picked_TK.sum(axis=1)
    most = entropy(load_E) - float((picks_T * np.log(np.maximum(picks_T, 1))).sum() / picks_T.sum())
    shuffled_T = np.random.default_rng(seed).permutation(places_T)
    found, chance = (
        _information(places, picks_TK, num_experts, len(text.vocab_U)) for places in (places_T, shuffled_T)
    )
    if most - chance < 1e-3:
        return 0.0
    return float(np.clip((found - chance) / (most - chance), 0.0, 1.0))


def entropy(p: Array) -> float:
    """Nats."""
    positive = p[p > 0]
    return float(-(positive * np.log(positive)).sum())


def _information(places_T: Array, picks_TK: Array, num_experts: int, num_places: int) -> float:
    """Mutual information of token and pick in nats."""
    pairs = count_pairs(places_T, picks_TK, num_experts, num_places)
    joint = pairs.counts / pairs.counts.sum()
    of_expert = np.bincount(pairs.experts, weights=joint, minlength=num_experts)
    of_token = np.bincount(pairs.tokens, weights=joint, minlength=num_places)
    return float((joint * np.log(joint / (of_expert[pairs.experts] * of_token[pairs.tokens]))).sum())
