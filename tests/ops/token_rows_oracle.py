"""Tokens as rows for ranks, written out."""

import numpy as np
from torch import Tensor


def expected_rows(ids_TK: Tensor, weights_TK: Tensor, num_ranks: int, num_local: int) -> tuple[np.ndarray, ...]:
    """inverse_TW, -1 where a token does not go; picks_RC; counts_W2."""
    ids, weights = ids_TK.numpy(), weights_TK.numpy()
    inverse, counts, rows = np.full((len(ids), num_ranks), -1), np.zeros((num_ranks, 2), int), []
    for rank in range(num_ranks):
        experts = range(rank * num_local, (rank + 1) * num_local)
        for token, (chosen, of_chosen) in enumerate(zip(ids, weights)):
            here = [i in experts for i in chosen]
            if any(here):
                inverse[token, rank] = len(rows)
                local = [i - experts.start if h else num_local for i, h in zip(chosen, here)]
                rows.append([*of_chosen, *local])
                counts[rank] += 1, sum(here)
    return inverse, np.array(rows, dtype=weights.dtype).reshape(-1, 2 * ids.shape[1]), counts
