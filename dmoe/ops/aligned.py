"""Widths for kernels that need rows of a multiple of 16 bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _pad_to(t: Tensor, dim: int, multiple: int) -> Tensor:
    extra = -t.shape[dim] % multiple
    return t if extra == 0 else F.pad(t, [0, 0] * (t.dim() - 1 - dim % t.dim()) + [0, extra])


def with_aligned_widths(
    call: Callable[..., Tensor], x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor,
    gate_up_proj: Tensor, down_proj: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """`call` of the arguments of `expert_mlp`, contiguous and with fp32 routing weights.

    Rows that are no multiple of 16 bytes are padded with zeros, which add nothing, and every activation maps 0 to 0.
    That copies the weights at every call; widths that are a multiple of 8 elements are passed on as they are.
    """
    x, ids, weights = x_TD.contiguous(), topk_ids_TK.contiguous(), topk_weights_TK.float().contiguous()
    gate_up, down = gate_up_proj.contiguous(), down_proj.contiguous()
    gate_up_bias = None if gate_up_bias is None else gate_up_bias.contiguous()
    down_bias = None if down_bias is None else down_bias.contiguous()
    multiple, width = 16 // x.element_size(), x.shape[1]
    if width % multiple == 0 and down.shape[2] % multiple == 0:
        return call(x, ids, weights, gate_up, down, gate_up_bias, down_bias, activation)
    num_experts, num_rows, _ = gate_up.shape
    halves = num_rows // down.shape[2]  # 2 for gated experts: gate and up are padded separately
    gate_up = _pad_to(_pad_to(gate_up.view(num_experts, halves, -1, width), 2, multiple), 3, multiple).flatten(1, 2)
    if gate_up_bias is not None:
        gate_up_bias = _pad_to(gate_up_bias.view(num_experts, halves, -1), 2, multiple).flatten(1)
    down = _pad_to(_pad_to(down, 1, multiple), 2, multiple)
    down_bias = None if down_bias is None else _pad_to(down_bias, 1, multiple)
    return call(_pad_to(x, 1, multiple), ids, weights, gate_up, down, gate_up_bias, down_bias, activation)[:, :width]
