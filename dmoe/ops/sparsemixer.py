"""SparseMixer: two experts a token, drawn in training, with a gradient for the draw.

Legend: T tokens, E experts. K is 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP_K = 2
# 1/3, which multiplies a pick that is not the likeliest three times in four, and what it lacks to 1; PhiMoE's digits.
_THIRD, _REST = 0.3333, 0.6667


def sparsemixer(
    logits_TE: Tensor, eps: float, *, training: bool, ids_T2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """SparseMixer-v2 (Liu et al., "GRIN: GRadient-INformed MoE", arXiv:2409.12136), in the form that PhiMoE has.

    The first pick is among the experts e whose logit is near the highest, (max - l_e) / max(|l_e|, max) <= 2 eps; the
    second is so among the others. Without training it is the expert of the highest logit. In training it is drawn from
    p, the softmax over the experts that are near, and its weight w, which is p of the pick, is then multiplied by 1/3
    with probability 3/4 if the pick is not the likeliest, so that the mean is that of Heun's third-order method. The
    gradient is that of w without the factor: dw / dl_e = w ([e is the pick] - p_e), and 0 where e is not near.

    Draws come from the default generator of the device.

    Args:
        eps: relative half-width of what counts as near.
        ids_T2: picks to weigh in place of a choice. They count as near wherever their logits are.

    Returns:
        ids int64 [T, 2] and weights [T, 2] in the dtype of the logits. Weights do not sum to 1.
    """
    first_T1, second_T1 = (None, None) if ids_T2 is None else (ids_T2[:, :1], ids_T2[:, 1:])
    none_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    first_T1, first_weight_T1 = _pick(logits_TE, none_TE, eps, training, first_T1)
    taken_TE = none_TE.scatter(1, first_T1, True)
    second_T1, second_weight_T1 = _pick(logits_TE, taken_TE, eps, training, second_T1)
    return torch.cat([first_T1, second_T1], dim=1), torch.cat([first_weight_T1, second_weight_T1], dim=1)


def _pick(
    logits_TE: Tensor, taken_TE: Tensor, eps: float, training: bool, pick_T1: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One expert of those not taken, and its weight."""
    with torch.no_grad():
        best_T1, best_id_T1 = logits_TE.masked_fill(taken_TE, float("-inf")).max(dim=1, keepdim=True)
        # 0 / 0, where all logits are 0, is not greater: such experts are near.
        far_TE = (best_T1 - logits_TE) / logits_TE.abs().maximum(best_T1) > 2 * eps
        closed_TE = far_TE | taken_TE
        if pick_T1 is not None:
            closed_TE = closed_TE.scatter(1, pick_T1, False)
        elif training:
            gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()
            pick_T1 = (logits_TE + gumbel_TE).masked_fill(closed_TE, float("-inf")).argmax(dim=1, keepdim=True)
        else:
            pick_T1 = best_id_T1
    p_TE = logits_TE.masked_fill(closed_TE, float("-inf")).softmax(dim=1)
    weight_T1 = p_TE.gather(1, pick_T1)
    if not training:
        return pick_T1, weight_T1
    with torch.no_grad():
        whole_T1 = (pick_T1 == p_TE.argmax(dim=1, keepdim=True)) | (torch.rand_like(best_T1) > 0.75)
        factor_T1 = whole_T1.to(p_TE.dtype) * _REST + _THIRD
    value_T1 = weight_T1.detach()
    return pick_T1, value_T1 * factor_T1 + (weight_T1 - value_T1)  # the difference is 0 and has the gradient
