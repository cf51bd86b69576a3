"""Expert choice: experts choose tokens, so that every expert has the same load.

Legend: T tokens, E experts, C tokens an expert takes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def expert_choice(scores_TE: Tensor, capacity: int, valid_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The C tokens of highest score of each expert (Zhou et al., arXiv:2202.09368, section 3.2).

    A token may be chosen by any number of experts, also by none. The choice looks at all tokens of the batch, later
    ones included: with it, a causal model sees a little of the future. No host synchronisation.

    Args:
        scores_TE: finite scores.
        capacity: C, 0 or greater; T * K / E for K experts a token on average.
        valid_T: bool, True where a token may be chosen; None: all may.

    Returns:
        tokens_EC int64, by falling score, of equal ones the lower index first, and weights_EC, the scores of those
        tokens. Slots for which there is no token left come last and hold the index T and the weight 0.
    """
    num_tokens = scores_TE.shape[0]
    scores_ET = scores_TE.t()
    choice_ET = scores_ET.detach()
    if valid_T is not None:
        choice_ET = choice_ET.masked_fill(~valid_T, float("-inf"))
    # Not topk: which of equal scores it takes is not defined.
    tokens_EC = choice_ET.sort(dim=1, descending=True, stable=True).indices[:, :capacity]
    weights_EC = scores_ET.gather(1, tokens_EC)
    if valid_T is not None:
        missing_EC = ~valid_T[tokens_EC]
        tokens_EC, weights_EC = tokens_EC.masked_fill(missing_EC, num_tokens), weights_EC.masked_fill(missing_EC, 0.0)
    padding = (0, max(0, capacity - num_tokens))
    return F.pad(tokens_EC, padding, value=num_tokens), F.pad(weights_EC, padding)
