"""The torch backend: two grouped matrix products over rows sorted by expert, with a hand-written backward.

The same operators on CPU and GPU, but for the layout of the groups (`dmoe.ops.products`). It is a custom operator, so
`torch.compile` traces through it as one node and autograd keeps only what the backward needs: x, the pre-activation H,
the routing weights and the permutation. Per token that is K * H-width elements beside x; the gathered input, the
activation and the expert outputs are not kept.

Legend: T tokens, D width, K picks, R = T*K rows sorted by expert, E experts, F expert width, H = 2F (gated) or F.

With row r of expert e belonging to token t and routing weight s, and W1, W2 the two projections of e:

    forward    h = W1 x_t        a = act(h)       y_r = W2 (s a)             out_t = sum over its K rows of y_r
    backward   g = W2^T dout_t   ds = <g, a>      dh = act'(h) * (s g)       dx_t = sum over its K rows of W1^T dh
               dW2 += dout_t (s a)^T              dW1 += dh x_t^T

The weight s multiplies the activation in fp32 before the down projection: it is applied once, and y_r need not be kept
for ds. The idea of recomputing the activation from H and of ds = <W2^T dout, a> is that of SonicMoE, arXiv:2512.14080.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.activations import activate, activate_backward
from dmoe.ops.permute import sum_picks
from dmoe.ops.products import is_batch, permute_rows, rows_times_weights, weight_gradient

# Elements per activation block on the CPU: the fp32 temporaries of a block stay in the cache of a core.
_CPU_BLOCK = 2**18


def _blocks(rows_RH: Tensor) -> Iterator[slice]:
    on_cpu = rows_RH.device.type == "cpu"
    step = max(512, _CPU_BLOCK // rows_RH.shape[1]) if on_cpu else max(1, rows_RH.shape[0])
    for start in range(0, rows_RH.shape[0], step):
        yield slice(start, start + step)


def _row_metadata(order_R: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token, expert and weight [R, 1] of each row. A row that only pads is a copy of some token with weight 0."""
    num_tokens, top_k = topk_ids_TK.shape
    tokens_R, ids, weights = order_R // top_k, topk_ids_TK.reshape(-1), topk_weights_TK.reshape(-1)
    if order_R.numel() != ids.numel():
        tokens_R, ids, weights = tokens_R.clamp_(max=num_tokens - 1), F.pad(ids, (0, 1)), F.pad(weights, (0, 1))
    return tokens_R, ids[order_R], weights[order_R].unsqueeze(1)


def _segment_sum(rows_RC: Tensor, offsets_E: Tensor) -> Tensor:
    """[E, C] sums of each expert's rows, in row order with fp32 accumulation."""
    lengths = torch.diff(offsets_E.long(), prepend=offsets_E.new_zeros(1, dtype=torch.int64))
    return torch.segment_reduce(rows_RC.float(), "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True).to(
        rows_RC.dtype
    )


@torch.library.custom_op("dmoe::expert_mlp", mutates_args=())
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
    may_pad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y_TD and, for the backward: h_RH (no rows unless `save`) and the three parts of the permutation.

    `may_pad` lets the number of rows depend on the routing: on the CPU and outside the compiler.
    """
    gated = gate_up_proj.shape[1] == 2 * down_proj.shape[2]
    permutation = permute_rows(topk_ids_TK, gate_up_proj, may_pad)
    order_R, inverse_TK, offsets_E = permutation
    batch = is_batch(order_R, inverse_TK, offsets_E)
    tokens_R, experts_R, scale_R1 = _row_metadata(order_R, topk_ids_TK, topk_weights_TK)

    x_RD = x_TD.index_select(0, tokens_R)
    h_RH = rows_times_weights(x_RD, gate_up_proj.transpose(1, 2), offsets_E, batch)
    if gate_up_bias is not None:
        h_RH += gate_up_bias.index_select(0, experts_R)
    a_RF = x_TD.new_empty(h_RH.shape[0], down_proj.shape[2])
    for block in _blocks(h_RH):
        torch.mul(activate(h_RH[block], activation, gated=gated), scale_R1[block], out=a_RF[block])
    y_RD = rows_times_weights(a_RF, down_proj.transpose(1, 2), offsets_E, batch)
    if down_bias is not None:
        y_RD += (down_bias.index_select(0, experts_R) * scale_R1).to(y_RD.dtype)
    if not save:
        h_RH = h_RH.new_empty(0, h_RH.shape[1])
    return sum_picks(y_RD, inverse_TK), h_RH, *permutation


@_expert_mlp.register_fake
def _(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    save: bool,
    may_pad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = topk_ids_TK.numel()
    return (
        x_TD.new_empty(x_TD.shape),
        x_TD.new_empty(rows if save else 0, gate_up_proj.shape[1]),
        topk_ids_TK.new_empty(rows, dtype=torch.int64),
        topk_ids_TK.new_empty(topk_ids_TK.shape, dtype=torch.int64),
        topk_ids_TK.new_empty(gate_up_proj.shape[0], dtype=torch.int32),
    )


@torch.library.custom_op("dmoe::expert_mlp_backward", mutates_args=())
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
    batch = is_batch(order_R, inverse_TK, offsets_E)
    tokens_R, experts_R, scale_R1 = _row_metadata(order_R, topk_ids_TK, topk_weights_TK)
    none = x_TD.new_empty(0)
    grad_x = grad_weights = grad_gate_up = grad_down = grad_gate_up_bias = grad_down_bias = none

    # Contiguous rows whatever the strides of the gradient: that of y.sum() is an expanded scalar, and grouped_mm
    # refuses zero strides.
    grad_RD = grad_TD.index_select(0, tokens_R)
    grad_a_RF = rows_times_weights(grad_RD, down_proj, offsets_E, batch)
    grad_h_RH = torch.empty_like(h_RH)
    grad_s_R = scale_R1.new_empty(order_R.shape)
    a_RF = torch.empty_like(grad_a_RF)
    for block in _blocks(h_RH):
        g_RF, s_R1 = grad_a_RF[block].to(scale_R1.dtype), scale_R1[block]
        a = activate_backward(g_RF * s_R1, h_RH[block], activation, gated=gated, out=grad_h_RH[block])
        torch.sum(g_RF.mul_(a), dim=1, out=grad_s_R[block])
        torch.mul(a, s_R1, out=a_RF[block])

    if needs_down:
        grad_down = weight_gradient(grad_RD, a_RF, offsets_E, batch)
    if needs_down_bias:
        grad_down_bias = _segment_sum((grad_RD * scale_R1).to(x_TD.dtype), offsets_E)
    if needs_weights:
        if down_bias is not None:
            grad_s_R += (grad_RD * down_bias.index_select(0, experts_R)).sum(dim=1, dtype=grad_s_R.dtype)
        grad_weights = grad_s_R[inverse_TK]
    if needs_gate_up:
        grad_gate_up = weight_gradient(grad_h_RH, x_TD.index_select(0, tokens_R), offsets_E, batch)
    if needs_gate_up_bias:
        grad_gate_up_bias = _segment_sum(grad_h_RH, offsets_E)
    if needs_x:
        grad_x = sum_picks(rows_times_weights(grad_h_RH, gate_up_proj, offsets_E, batch), inverse_TK)
    # An operator may not return one tensor twice.
    outputs = (grad_x, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias)
    return tuple(t if t is not none else none.clone() for t in outputs)  # type: ignore[return-value]


@_expert_mlp_backward.register_fake
def _(
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
) -> tuple[Tensor, ...]:
    inputs = (x_TD, topk_weights_TK, gate_up_proj, down_proj, gate_up_bias, down_bias)
    return tuple(
        x_TD.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip(inputs, needs, strict=True)
    )


class _ExpertMLPBackward(torch.autograd.Function):
    """The backward as a node of its own, so that a second derivative is an error and not silently zero."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _expert_mlp_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError('expert_mlp: backend "torch" is not differentiable twice: use backend="reference"')


class _ExpertMLP(torch.autograd.Function):
    """Autograd over the two operators. A Function rather than a formula registered with the operator, because
    `torch.func.grad` and its kin accept only the former."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():  # functorch runs this with gradients enabled
            return _expert_mlp(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, activation, _save, _may_pad = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.activation = activation

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6)]
        args = (grad_TD, *ctx.saved_tensors, ctx.activation, wanted)
        # The compiler cannot trace a Function inside a backward, and refuses second derivatives by itself.
        grads = _expert_mlp_backward(*args) if torch.compiler.is_compiling() else _ExpertMLPBackward.apply(*args)
        dx, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias = (g if w else None for g, w in zip(grads, wanted))
        return dx, None, dweights, dgate_up, ddown, dgate_up_bias, ddown_bias, None, None, None


def _call(x_TD: Tensor, *args: Any) -> Tensor:
    half = x_TD.element_size() == 2
    may_pad = half and x_TD.device.type == "cpu" and not torch.compiler.is_compiling()
    if torch.is_grad_enabled():
        return _ExpertMLP.apply(x_TD, *args, True, may_pad)[0]
    return _expert_mlp(x_TD, *args, False, may_pad)[0]


def _pad_to(t: Tensor, dim: int, multiple: int) -> Tensor:
    extra = -t.shape[dim] % multiple
    return t if extra == 0 else F.pad(t, [0, 0] * (t.dim() - 1 - dim % t.dim()) + [0, extra])


def _aligned_call(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor,
    gate_up_bias: Tensor | None, down_bias: Tensor | None, activation: str, multiple: int,
) -> Tensor:  # fmt: skip
    """`_call` for widths whose rows are not a multiple of 16 bytes: pad the weights with zeros, cut the result.

    Zero columns add nothing and every activation maps 0 to 0. This copies the weights at every call; widths that are
    a multiple of 8 never come here.
    """
    num_experts, num_rows, width = gate_up.shape
    halves = num_rows // down.shape[2]  # 2 for gated experts: gate and up are padded separately
    gate_up = _pad_to(_pad_to(gate_up.view(num_experts, halves, -1, width), 2, multiple), 3, multiple).flatten(1, 2)
    if gate_up_bias is not None:
        gate_up_bias = _pad_to(gate_up_bias.view(num_experts, halves, -1), 2, multiple).flatten(1)
    down = _pad_to(_pad_to(down, 1, multiple), 2, multiple)
    down_bias = None if down_bias is None else _pad_to(down_bias, 1, multiple)
    return _call(_pad_to(x, 1, multiple), ids, weights, gate_up, down, gate_up_bias, down_bias, activation)[:, :width]


def expert_mlp_grouped(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """See `dmoe.ops.expert_mlp`. fp32, bf16 and fp16. A second derivative is a RuntimeError."""
    gate_up_proj, down_proj = gate_up_proj.contiguous(), down_proj.contiguous()
    args = (x_TD.contiguous(), topk_ids_TK, topk_weights_TK.float(), gate_up_proj, down_proj, gate_up_bias, down_bias)
    multiple = 16 // x_TD.element_size()
    if x_TD.shape[1] % multiple or down_proj.shape[2] % multiple:
        return _aligned_call(*args, activation, multiple)
    return _call(*args, activation)
