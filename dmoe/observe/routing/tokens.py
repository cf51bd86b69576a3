"""Which tokens an expert gets: counts of (expert, token), and the tokens it gets more often than by chance.

Legend: T tokens, K picks a token, E experts, U different tokens of the text, N tokens listed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dmoe.observe.routing.summary import Array


class TokenCounts(NamedTuple):
    """Pairs that occur, sorted by expert, then token; int64 [P] each."""

    experts: Array
    tokens: Array
    """Places in `vocab`."""
    counts: Array


class Text(NamedTuple):
    """Token ids of a text, by place in the list of its different tokens."""

    vocab_U: Array
    """int64: the different token ids, rising."""
    places_T: Array
    """int64: place of each token."""
    counts_U: Array
    """int64: how often each occurs."""


def text_of(token_ids_T: Array) -> Text:
    """The different tokens of a text."""
    vocab_U, places_T, counts_U = np.unique(token_ids_T, return_inverse=True, return_counts=True)
    return Text(vocab_U, places_T.reshape(-1), counts_U)


def count_pairs(places_T: Array, picks_TK: Array, num_experts: int, num_places: int) -> TokenCounts:
    """How often each expert is picked for each token. Memory of the order of the picks, not of E * U."""
    experts_R = picks_TK.reshape(-1).astype(np.int64)
    places_R = np.repeat(places_T, picks_TK.shape[1])
    keys_R = (experts_R * num_places + places_R)[experts_R < num_experts]
    keys, counts = np.unique(keys_R, return_counts=True)
    experts, tokens = np.divmod(keys, max(num_places, 1))
    return TokenCounts(experts, tokens, counts)


def default_min_count(num_tokens: int) -> int:
    """Picks below which a lift is chance: 3 for short texts, 20 for 100,000 tokens."""
    return max(3, num_tokens // 5000)


def top_tokens(
    text: Text, pairs: TokenCounts, num_experts: int, listed: int, min_count: int
) -> tuple[Array, Array, Array]:
    """The tokens of highest lift of each expert: ids int32, lifts float32 and counts int32, [E, listed] each.

    Lift is the token's share of the expert's picks over its share of the text. Of equal lifts the token with more
    picks comes first, then the lower id. Tokens picked fewer than `min_count` times, or with a lift of 1 or less, are
    left out; -1, 0 and 0 fill up.
    """
    ids_EN = np.full((num_experts, listed), -1, dtype=np.int32)
    lift_EN = np.zeros((num_experts, listed), dtype=np.float32)
    count_EN = np.zeros((num_experts, listed), dtype=np.int32)
    picks_E = np.bincount(pairs.experts, weights=pairs.counts, minlength=num_experts)
    total = text.counts_U.sum()
    lifts = pairs.counts * total / (picks_E[pairs.experts] * text.counts_U[pairs.tokens])
    kept = np.flatnonzero((pairs.counts >= min_count) & (lifts > 1))
    order = kept[np.lexsort((pairs.tokens[kept], -pairs.counts[kept], -lifts[kept], pairs.experts[kept]))]
    experts = pairs.experts[order]
    ranks = np.arange(len(order)) - np.searchsorted(experts, experts)
    order, experts, ranks = (values[ranks < listed] for values in (order, experts, ranks))
    ids_EN[experts, ranks] = text.vocab_U[pairs.tokens[order]]
    lift_EN[experts, ranks] = lifts[order]
    count_EN[experts, ranks] = pairs.counts[order]
    return ids_EN, lift_EN, count_EN
