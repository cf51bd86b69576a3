"""The reference backend: a plain loop over experts in ordinary differentiable torch.

It defines what the other backends compute. It shares no permutation and no hand-written gradient with them, works in
any floating dtype (fp64 included), and can be differentiated twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.activations import activate


def expert_mlp_reference(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """See `dmoe.ops.expert_mlp`."""
    gated = gate_up_proj.shape[1] == 2 * down_proj.shape[2]
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    out_TKD = x_TD.new_zeros(*topk_ids_TK.shape, x_TD.shape[1], dtype=wide)
    # unbind, not w[e]: indexing would give each expert a full-size gradient tensor of its own.
    up_e, down_e = gate_up_proj.unbind(0), down_proj.unbind(0)
    tokens, picks, rows = [], [], []
    for e in range(len(up_e)):
        t, k = torch.where(topk_ids_TK == e)
        h = F.linear(x_TD[t], up_e[e], None if gate_up_bias is None else gate_up_bias[e])
        a = activate(h, activation, gated=gated).to(x_TD.dtype)
        y = F.linear(a, down_e[e], None if down_bias is None else down_bias[e])
        tokens.append(t)
        picks.append(k)
        rows.append(y.to(wide))
    out_TKD = out_TKD.index_put((torch.cat(tokens), torch.cat(picks)), torch.cat(rows))
    # The weight of a pick of no expert may be anything, and 0 * NaN is NaN.
    weights_TK = topk_weights_TK.to(wide).masked_fill(topk_ids_TK >= len(up_e), 0)
    return (out_TKD * weights_TK.unsqueeze(-1)).sum(dim=1).to(x_TD.dtype)
