"""How alike two routings of the same tokens are, whatever the experts are called.

Legend: T tokens, K picks a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dmoe.observe.routing.summary import Array

MAX_TOKENS = 1024


def likeness(picks: Sequence[Array], num_experts: Sequence[int]) -> Array:
    """float64 [N, N]: how alike N routings treat the same tokens: 1 if they group them alike, near 0 by chance.

    Linear CKA of the pick indicators (Kornblith et al., "Similarity of Neural Network Representations Revisited",
    arXiv:1905.00414, eq. 1) with the unbiased estimate of HSIC (Song et al., "Feature Selection via Dependence
    Maximization", JMLR 13, 2012, eq. 5), so that few tokens and many experts do not look alike. Renaming the experts
    changes nothing. NaN for a routing that treats all tokens the same.

    Args:
        picks: [T, K] each, K may differ; ids at or above the number of experts are none. Of more than 1024 tokens
            that many are taken, evenly.
        num_experts: of each routing.
    """
    tokens = len(picks[0])
    chosen = np.linspace(0, tokens - 1, min(tokens, MAX_TOKENS)).astype(int)
    n = len(chosen)
    if n < 4:
        return np.full((len(picks), len(picks)), np.nan)
    grams = np.stack([_gram(picks_TK[chosen], experts) for picks_TK, experts in zip(picks, num_experts)])
    row_sums = grams.sum(axis=2, dtype=np.float64)
    sums = row_sums.sum(axis=1)
    flat = grams.reshape(len(grams), -1)
    traces = (flat @ flat.T).astype(np.float64)
    hsic = traces + np.outer(sums, sums) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (row_sums @ row_sums.T)
    own = np.diagonal(hsic).copy()
    own[own <= 1e-5 * np.diagonal(traces)] = np.nan  # all tokens alike: what is left is rounding
    return np.asarray(hsic / np.sqrt(np.outer(own, own)))


def _gram(picks_TK: Array, num_experts: int) -> Array:
    """[T, T]: experts that two tokens have in common; 0 on the diagonal."""
    picked_TE = np.zeros((len(picks_TK), num_experts + 1), dtype=np.float32)
    np.put_along_axis(picked_TE, np.minimum(picks_TK.astype(np.int64), num_experts), 1.0, axis=1)
    gram = picked_TE[:, :num_experts] @ picked_TE[:, :num_experts].T
    np.fill_diagonal(gram, 0.0)
    return np.asarray(gram)
