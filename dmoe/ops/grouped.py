"""The torch backend: two grouped matrix products over rows sorted by expert, with a hand-written backward.

The same operators on CPU and GPU, but for the layout of the groups (`dmoe.ops.products`). It is a custom operator, so
`torch.compile` traces through it as one node and autograd keeps only what the backward needs: x, the pre-activation H,
the routing weights and the permutation. Per token that is K * H-width elements beside x; the gathered input, the
activation and the expert outputs are not kept.

Legend: T tokens, D width, K picks, R = T*K rows sorted by expert, S = R + 1, E experts, F expert width, H = 2F (gated)
or F.

With row r of expert e belonging to token t and routing weight s, and W1, W2 the two projections of e:

    forward    h = W1 x_t        a = act(h)       y_r = W2 (s a)             out_t = sum over its K rows of y_r
    backward   g = W2^T dout_t   ds = <g, a>      dh = act'(h) * (s g)       dx_t = sum over its K rows of W1^T dh
               dW2 += dout_t (s a)^T              dW1 += dh x_t^T

The weight s multiplies the activation in fp32 before the down projection: it is applied once, and y_r need not be kept
for ds. The idea of recomputing the activation from H and of ds = <W2^T dout, a> is that of SonicMoE, arXiv:2512.14080.

Picks of no expert are rows after the last expert's. The products leave them out, and what they hold, NaN or not,
reaches nothing; on the CPU they are cut off. In sums over picks they all stand for one further row, of zeros, the last
of S.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.activations import activate, activate_backward
from dmoe.ops.aligned import with_aligned_widths
from dmoe.ops.expert_autograd import expert_function, fake_backward, fake_forward
from dmoe.ops.permute import first_rows, sum_picks
from dmoe.ops.platform import on_its_device
from dmoe.ops.products import is_batch, permute_rows, rows_times_weights, weight_gradient

# Elements per activation block on the CPU: the fp32 temporaries of a block stay in the cache of a core.
_CPU_BLOCK = 2**18


def row_blocks(rows_RH: Tensor) -> Iterator[slice]:
    """Rows that an activation takes at once: few on the CPU, all of them elsewhere."""
    on_cpu = rows_RH.device.type == "cpu"
    step = max(512, _CPU_BLOCK // rows_RH.shape[1]) if on_cpu else max(1, rows_RH.shape[0])
    for start in range(0, rows_RH.shape[0], step):
        yield slice(start, start + step)


def row_metadata(order_R: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and weight [R, 1] of each row. A row that only pads is a copy of another row with weight 0."""
    tokens_from_R, ids, weights = order_R, topk_ids_TK.reshape(-1), topk_weights_TK.reshape(-1)
    if order_R.device.type == "cpu" and order_R.numel():  # where groups may be padded
        # Of another row, and not of any token: one without an expert may be NaN, and 0 * NaN is NaN.
        tokens_from_R = torch.where(order_R < ids.numel(), order_R, order_R.min())
        ids, weights = F.pad(ids, (0, 1)), F.pad(weights, (0, 1))
    return tokens_from_R // topk_ids_TK.shape[1], ids[order_R], weights[order_R].unsqueeze(1)


def row_biases(bias_EC: Tensor, experts_R: Tensor) -> Tensor:
    """[R, C]: the bias of each row's expert; for a row of no expert any."""
    return bias_EC.index_select(0, experts_R.clamp(max=bias_EC.shape[0] - 1))


def segment_sum(rows_RC: Tensor, offsets_E: Tensor) -> Tensor:
    """[E, C] sums of each expert's rows, in row order with fp32 accumulation."""
    lengths = torch.diff(offsets_E.long(), prepend=offsets_E.new_zeros(1, dtype=torch.int64))
    return torch.segment_reduce(rows_RC.float(), "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True).to(
        rows_RC.dtype
    )


@torch.library.custom_op("dmoe::expert_mlp", mutates_args=())
@on_its_device
def _expert_mlp(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    save: bool,
    may_resize: bool,
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y_TD and, for the backward: h_RH (no rows unless `save`) and the three parts of the permutation.

    `may_resize` lets the number of rows depend on the routing: on the CPU and outside the compiler.
    """
    gated = gate_up_proj.shape[1] == 2 * down_proj.shape[2]
    permutation = permute_rows(topk_ids_TK, gate_up_proj, may_resize)
    if num_rows is not None and not may_resize:
        permutation = first_rows(permutation, num_rows)
    order_R, inverse_TK, offsets_E = permutation
    batch = is_batch(x_TD, order_R, inverse_TK, offsets_E)
    tokens_R, experts_R, scale_R1 = row_metadata(order_R, topk_ids_TK, topk_weights_TK)

    x_RD = x_TD.index_select(0, tokens_R)
    h_RH = rows_times_weights(x_RD, gate_up_proj.transpose(1, 2), offsets_E, batch)
    if gate_up_bias is not None:
        h_RH += row_biases(gate_up_bias, experts_R)
    a_SF = x_TD.new_empty(h_RH.shape[0] + 1, down_proj.shape[2])
    a_RF = a_SF[:-1]
    for block in row_blocks(h_RH):
        torch.mul(activate(h_RH[block], activation, gated=gated), scale_R1[block], out=a_RF[block])
    y_SD = rows_times_weights(a_SF, down_proj.transpose(1, 2), offsets_E, batch)
    if down_bias is not None:
        y_SD[:-1] += (row_biases(down_bias, experts_R) * scale_R1).to(y_SD.dtype)
    y_SD[-1].zero_()
    if not save:
        h_RH = h_RH.new_empty(0, h_RH.shape[1])
    return sum_picks(y_SD, inverse_TK), h_RH, *permutation


_expert_mlp.register_fake(fake_forward(torch.int64))


@torch.library.custom_op("dmoe::expert_mlp_backward", mutates_args=())
@on_its_device
def _expert_mlp_backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    h_RH: Tensor,
    order_R: Tensor,
    inverse_TK: Tensor,
    offsets_E: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, topk_weights, gate_up_proj, down_proj and the two biases; empty where `needs` says no."""
    needs_x, needs_weights, needs_gate_up, needs_down, needs_gate_up_bias, needs_down_bias = needs
    gated = gate_up_proj.shape[1] == 2 * down_proj.shape[2]
    batch = is_batch(x_TD, order_R, inverse_TK, offsets_E)
    tokens_R, experts_R, scale_R1 = row_metadata(order_R, topk_ids_TK, topk_weights_TK)
    none = x_TD.new_empty(0)
    grad_x = grad_weights = grad_gate_up = grad_down = grad_gate_up_bias = grad_down_bias = none

    # Contiguous rows whatever the strides of the gradient: that of y.sum() is an expanded scalar, and grouped_mm
    # refuses zero strides.
    grad_RD = grad_TD.index_select(0, tokens_R)
    grad_a_RF = rows_times_weights(grad_RD, down_proj, offsets_E, batch)
    grad_h_SH = h_RH.new_empty(h_RH.shape[0] + 1, h_RH.shape[1])
    grad_h_RH = grad_h_SH[:-1]
    grad_s_R = scale_R1.new_empty(order_R.shape)
    a_RF = torch.empty_like(grad_a_RF)
    for block in row_blocks(h_RH):
        g_RF, s_R1 = grad_a_RF[block].to(scale_R1.dtype), scale_R1[block]
        a = activate_backward(g_RF * s_R1, h_RH[block], activation, gated=gated, out=grad_h_RH[block])
        torch.sum(g_RF.mul_(a), dim=1, out=grad_s_R[block])
        torch.mul(a, s_R1, out=a_RF[block])

    if needs_down:
        grad_down = weight_gradient(grad_RD, a_RF, offsets_E, batch)
    if needs_down_bias:
        grad_down_bias = segment_sum((grad_RD * scale_R1).to(x_TD.dtype), offsets_E)
    if needs_weights:
        if down_bias is not None:
            grad_s_R += (grad_RD * row_biases(down_bias, experts_R)).sum(dim=1, dtype=grad_s_R.dtype)
        grad_weights = F.pad(grad_s_R, (0, 1))[inverse_TK]
    if needs_gate_up:
        grad_gate_up = weight_gradient(grad_h_RH, x_TD.index_select(0, tokens_R), offsets_E, batch)
    if needs_gate_up_bias:
        grad_gate_up_bias = segment_sum(grad_h_RH, offsets_E)
    if needs_x:
        dx_SD = rows_times_weights(grad_h_SH, gate_up_proj, offsets_E, batch)
        dx_SD[-1].zero_()
        grad_x = sum_picks(dx_SD, inverse_TK)
    # An operator may not return one tensor twice.
    outputs = (grad_x, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias)
    return tuple(t if t is not none else none.clone() for t in outputs)  # type: ignore[return-value]


_expert_mlp_backward.register_fake(fake_backward)


_ExpertMLP = expert_function(
    torch.ops.dmoe.expert_mlp.default, torch.ops.dmoe.expert_mlp_backward.default, 'backend "torch"'
)


def _call(num_rows: int | None, x_TD: Tensor, *args: Any) -> Tensor:
    may_resize = x_TD.device.type == "cpu" and not torch.compiler.is_compiling()
    if torch.is_grad_enabled():
        return _ExpertMLP.apply(x_TD, *args, True, may_resize, num_rows)[0]
    return _expert_mlp(x_TD, *args, False, may_resize, num_rows)[0]


def expert_mlp_grouped(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    num_rows: int | None = None,
) -> Tensor:
    """See `dmoe.ops.expert_mlp`. fp32, bf16 and fp16. A second derivative is a RuntimeError."""
    return with_aligned_widths(
        partial(_call, num_rows),
        x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, gate_up_bias, down_bias, activation,
    )  # fmt: skip
