"""Other ways to compute dropless SwiGLU experts, written as their users write them: what `expert_mlp` is timed against.

All take (x_TD, ids_TK, weights_TK, gate_up_proj, down_proj) and leave the backward to autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops import sort_by_expert


def _swiglu(h_RH: Tensor) -> Tensor:
    gate, up = h_RH.chunk(2, dim=-1)
    return F.silu(gate) * up


def _combine(y_RD: Tensor, weights_TK: Tensor, order_R: Tensor, inverse_TK: Tensor) -> Tensor:
    y_RD = y_RD * weights_TK.reshape(-1)[order_R].unsqueeze(1).to(y_RD.dtype)
    return y_RD[inverse_TK].sum(dim=1)


def loop_over_experts(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sort the rows, then one pair of products an expert. Reads the group sizes on the host."""
    order_R, inverse_TK, offsets_E = sort_by_expert(ids_TK, gate_up.shape[0])
    counts = torch.diff(offsets_E, prepend=offsets_E.new_zeros(1)).tolist()
    x_RD = x_TD[order_R // ids_TK.shape[1]]
    outputs = []
    for rows, up_e, down_e in zip(x_RD.split(counts), gate_up.unbind(0), down.unbind(0)):
        if len(rows):
            outputs.append(F.linear(_swiglu(F.linear(rows, up_e)), down_e))
    return _combine(torch.cat(outputs), weights_TK, order_R, inverse_TK)


def grouped_mm(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sort the rows, then two `torch.nn.functional.grouped_mm`."""
    order_R, inverse_TK, offsets_E = sort_by_expert(ids_TK, gate_up.shape[0])
    x_RD = x_TD[order_R // ids_TK.shape[1]]
    h_RH = F.grouped_mm(x_RD, gate_up.transpose(1, 2), offs=offsets_E)
    y_RD = F.grouped_mm(_swiglu(h_RH), down.transpose(1, 2), offs=offsets_E)
    return _combine(y_RD, weights_TK, order_R, inverse_TK)


def padded_bmm(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Pad every expert to the largest one and use two batched products. Reads the largest size on the host."""
    num_experts = gate_up.shape[0]
    order_R, inverse_TK, offsets_E = sort_by_expert(ids_TK, num_experts)
    starts_E = F.pad(offsets_E[:-1].long(), (1, 0))
    capacity = int((offsets_E - starts_E).max())
    experts_R = ids_TK.reshape(-1)[order_R]
    slots_R = experts_R * capacity + torch.arange(len(order_R), device=x_TD.device) - starts_E[experts_R]
    padded = x_TD.new_zeros(num_experts * capacity, x_TD.shape[1])
    padded = padded.index_copy(0, slots_R, x_TD[order_R // ids_TK.shape[1]]).view(num_experts, capacity, -1)
    y_ECD = torch.bmm(_swiglu(torch.bmm(padded, gate_up.transpose(1, 2))), down.transpose(1, 2))
    return _combine(y_ECD.flatten(0, 1)[slots_R], weights_TK, order_R, inverse_TK)


ALTERNATIVES = {"loop": loop_over_experts, "grouped_mm": grouped_mm, "padded_bmm": padded_bmm}
