"""FP8 experts: `expert_mlp` with both projections, forward and their data gradients, as products of 8-bit numbers.

Q rounds as `dmoe.ops.scaled` does, with a scale for each row along the contracted dimension, taken from it at each
call: a token's row, or the row of a weight that makes one output column. The operands of four products are rounded:

    forward    h = Q(W1) Q(x_t)      y_r = Q(W2) Q(s a)
    backward   g = Q(W2^T) Q(dout_t) dx = Q(W1^T) Q(dh)      dW2 += dout_t (s a)^T and dW1 += dh x_t^T in bf16

The rest is the torch backend's: see `dmoe.ops.grouped` for the names, the formulas and what is kept for the backward,
here with 32-bit indices. On a Hopper GPU the steps between the products are the triton backend's, and the rounding is
fused with what comes before it (`dmoe.ops.kernels.fp8`).

* As scales are powers of two, Q(W) and Q(W^T) hold the same numbers and the backward differentiates the function that
  ran. Rounding itself has derivative 1 (straight through).
* Weight gradients stay in bf16. They contract over an expert's rows, so fp8 would need both operands again, transposed
  and with scales for each column and expert; the kernel takes no group that is empty or no multiple of 16; and they are
  what the optimiser adds up over thousands of steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.errors import ConfigError
from dmoe.ops import permute, products
from dmoe.ops.activations import activate, activate_backward
from dmoe.ops.expert_autograd import expert_function, fake_backward, fake_forward, grad_weights_of_picks
from dmoe.ops.grouped import row_biases, row_blocks, row_metadata, segment_sum
from dmoe.ops.permute import Permutation
from dmoe.ops.platform import on_its_device
from dmoe.ops.products import is_batch
from dmoe.ops.scaled import (
    ALIGNMENT,
    E4M3,
    Scaled,
    fused_kernels,
    quantise_columns,
    quantise_picks,
    quantise_rows,
    scaled_product,
)

if TYPE_CHECKING:
    from dmoe.ops.kernels.launch import Tile

# Each step between the products: a kernel of `dmoe.ops.kernels` on a Hopper GPU, else torch's operators.


def _sort(topk_ids_TK: Tensor, gate_up_proj: Tensor, may_resize: bool) -> Permutation:
    """The picks grouped by expert, in int32."""
    if fused_kernels(gate_up_proj):
        from dmoe.ops.kernels.sorting import counting_sort

        return counting_sort(topk_ids_TK, gate_up_proj.shape[0])
    order_R, inverse_TK, offsets_E = products.permute_rows(topk_ids_TK, gate_up_proj, may_resize)
    return Permutation(order_R.int(), inverse_TK.int(), offsets_E)


def _spread(x_TD: Tensor, tokens_R: Tensor, inverse_TK: Tensor) -> Tensor:
    """The token of each sorted row, [R, D]."""
    if fused_kernels(x_TD):
        from dmoe.ops.kernels.rows import spread_rows

        return spread_rows(x_TD, inverse_TK)
    return x_TD.index_select(0, tokens_R)


def _sum_picks(y_RD: Tensor, inverse_TK: Tensor) -> Tensor:
    if fused_kernels(y_RD):
        from dmoe.ops.kernels.rows import sum_picks_triton

        return sum_picks_triton(y_RD, inverse_TK)
    return permute.sum_picks(y_RD, inverse_TK)


def _sum_products(rows: Scaled, weights: Scaled, offsets_E: Tensor, batch: bool, inverse_TK: Tensor) -> Tensor:
    """[T, D]: the sum of each token's rows of the product. The kernel skips picks of no expert, which torch's operator
    gives a row of zeros."""
    zero_row = fused_kernels(rows.scales) is None
    return _sum_picks(scaled_product(rows, weights, offsets_E, batch, zero_row=zero_row), inverse_TK)


def _sum_biases(bias_ED: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """[T, D] fp32: the sum of a token's biases times its routing weights, without rows of biases."""
    num_experts = bias_ED.shape[0]
    bias = F.pad(bias_ED.float(), (0, 0, 0, 1))
    weights_TK = topk_weights_TK.masked_fill(topk_ids_TK >= num_experts, 0)
    return F.embedding_bag(topk_ids_TK, bias, mode="sum", per_sample_weights=weights_TK)


def _gradient_tiles(x_TD: Tensor, topk_ids_TK: Tensor, down_proj: Tensor) -> tuple[Tile | None, Tile | None]:
    """Of the two weight gradients, gate_up and down. None: torch's products."""
    if not fused_kernels(x_TD):
        return None, None
    from dmoe.ops.kernels.tuned import choose_tiles

    num_experts, hidden_size, expert_width = down_proj.shape
    tiles = choose_tiles(x_TD, hidden_size, expert_width, topk_ids_TK.numel() // num_experts)
    return tiles.gate_up_gradient, tiles.down_gradient


def _weight_gradient(left_RM: Tensor, right_RN: Tensor, offsets_E: Tensor, batch: bool, tile: Tile | None) -> Tensor:
    """[E, M, N]: the sum over each expert's rows of left (outer) right."""
    if tile is None:
        return products.weight_gradient(left_RM, right_RN, offsets_E, batch)
    from dmoe.ops.kernels.products import weight_gradient

    return weight_gradient(left_RM, right_RN, offsets_E, tile)


def _expert_sums(rows_RC: Tensor, weights_R1: Tensor | None, offsets_E: Tensor, tile: Tile | None) -> Tensor:
    """[E, C]: the sum of each expert's rows, each times its weight."""
    if tile is None:
        return segment_sum(rows_RC if weights_R1 is None else (rows_RC * weights_R1).to(rows_RC.dtype), offsets_E)
    # As the gradient of a matrix of 8 equal columns, the fewest that the kernel takes: one pass over the rows.
    weights_R1 = rows_RC.new_ones(rows_RC.shape[0], 1) if weights_R1 is None else weights_R1.to(rows_RC.dtype)
    columns_EC8 = _weight_gradient(rows_RC, weights_R1.expand(-1, 8).contiguous(), offsets_E, False, tile)
    return columns_EC8[:, :, 0].contiguous()


def _activate(
    h_RH: Tensor, bias_EH: Tensor | None, experts_R: Tensor, scale_R1: Tensor, activation: str, gated: bool,
    offsets_E: Tensor | None = None,
) -> Scaled:  # fmt: skip
    """The activation times the routing weight, in 8 bits. The bias of the row's expert is first added to `h_RH`.

    With `offsets_E` rows after the last expert's are undefined, else all rows are an expert's; so below.
    """
    kernels = fused_kernels(h_RH)
    if kernels is not None:
        return Scaled(*kernels.activate_rows(h_RH, bias_EH, experts_R, scale_R1, activation, gated, offsets_E))
    if bias_EH is not None:
        h_RH += row_biases(bias_EH, experts_R)
    width = h_RH.shape[1] // 2 if gated else h_RH.shape[1]
    a = Scaled(h_RH.new_empty(h_RH.shape[0], width, dtype=E4M3), scale_R1.new_empty(h_RH.shape[0]))
    for block in row_blocks(h_RH):
        part = quantise_rows(activate(h_RH[block], activation, gated=gated) * scale_R1[block])
        a.values[block], a.scales[block] = part
    return a


def _activate_backward(
    grad_a_RF: Tensor, h_RH: Tensor, scale_R1: Tensor, activation: str, gated: bool, offsets_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Scaled]:
    """dh [R, H] and s a [R, F] in bf16, ds [R] in fp32, and dh in 8 bits, from g [R, F]."""
    kernels = fused_kernels(h_RH)
    if kernels is not None:
        rows = (grad_a_RF, h_RH, scale_R1)
        grad_h, a, grad_s, *grad_h_8 = kernels.activate_backward_rows(*rows, activation, gated, offsets_E)
        return grad_h, a, grad_s, Scaled(*grad_h_8)
    grad_h_RH, a_RF = torch.empty_like(h_RH), torch.empty_like(grad_a_RF)
    grad_s_R = scale_R1.new_empty(h_RH.shape[0])
    for block in row_blocks(h_RH):
        g_RF, s_R1 = grad_a_RF[block].float(), scale_R1[block]
        a = activate_backward(g_RF * s_R1, h_RH[block], activation, gated=gated, out=grad_h_RH[block])
        torch.sum(g_RF.mul_(a), dim=1, out=grad_s_R[block])
        torch.mul(a, s_R1, out=a_RF[block])
    return grad_h_RH, a_RF, grad_s_R, quantise_rows(grad_h_RH)


@torch.library.custom_op("dmoe::expert_mlp_fp8", mutates_args=())
@on_its_device
def _expert_mlp_fp8(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns what that of `dmoe.ops.grouped` does. Tensors are bf16, routing weights fp32."""
    gated = gate_up_proj.shape[1] == 2 * down_proj.shape[2]
    permutation = _sort(topk_ids_TK, gate_up_proj, may_resize)
    order_R, inverse_TK, offsets_E = permutation
    batch = is_batch(x_TD, order_R, inverse_TK, offsets_E)
    tokens_R, experts_R, scale_R1 = row_metadata(order_R, topk_ids_TK, topk_weights_TK)

    x_RD = quantise_picks(x_TD, tokens_R, inverse_TK)
    h_RH = scaled_product(x_RD, quantise_rows(gate_up_proj), offsets_E, batch)
    del x_RD
    a_RF = _activate(h_RH, gate_up_bias, experts_R, scale_R1, activation, gated, offsets_E)
    if not save:
        h_RH = h_RH.new_empty(0, h_RH.shape[1])
    y_TD = _sum_products(a_RF, quantise_rows(down_proj), offsets_E, batch, inverse_TK)
    if down_bias is not None and topk_ids_TK.numel():
        y_TD += _sum_biases(down_bias, topk_ids_TK, topk_weights_TK)
    return y_TD, h_RH, *permutation


_expert_mlp_fp8.register_fake(fake_forward(torch.int32))


@torch.library.custom_op("dmoe::expert_mlp_fp8_backward", mutates_args=())
@on_its_device
def _expert_mlp_fp8_backward(
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
    none = [x_TD.new_empty(0) for _ in needs]  # an operator may not return one tensor twice
    grad_x, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias = none
    gated = gate_up_proj.shape[1] == 2 * down_proj.shape[2]
    batch = is_batch(x_TD, order_R, inverse_TK, offsets_E)
    tokens_R, _, scale_R1 = row_metadata(order_R, topk_ids_TK, topk_weights_TK)
    gate_up_tile, down_tile = _gradient_tiles(x_TD, topk_ids_TK, down_proj)
    grad_TD = grad_TD.contiguous()  # that of y.sum() is an expanded scalar

    grad_8 = quantise_picks(grad_TD, tokens_R, inverse_TK)
    grad_a_RF = scaled_product(grad_8, quantise_columns(down_proj), offsets_E, batch)
    del grad_8
    grad_h_RH, a_RF, grad_s_R, grad_h_8 = _activate_backward(grad_a_RF, h_RH, scale_R1, activation, gated, offsets_E)
    del grad_a_RF
    if needs_x:
        grad_x = _sum_products(grad_h_8, quantise_columns(gate_up_proj), offsets_E, batch, inverse_TK)
    del grad_h_8
    if needs_down or needs_down_bias:
        grad_RD = _spread(grad_TD, tokens_R, inverse_TK)
        if needs_down:
            grad_down = _weight_gradient(grad_RD, a_RF, offsets_E, batch, down_tile)
        if needs_down_bias:
            grad_down_bias = _expert_sums(grad_RD, scale_R1, offsets_E, down_tile)
        del grad_RD
    del a_RF
    if needs_gate_up:
        x_RD = _spread(x_TD, tokens_R, inverse_TK)
        grad_gate_up = _weight_gradient(grad_h_RH, x_RD, offsets_E, batch, gate_up_tile)
    if needs_gate_up_bias:
        grad_gate_up_bias = _expert_sums(grad_h_RH, None, offsets_E, gate_up_tile)
    if needs_weights:
        grad_weights = grad_weights_of_picks(grad_s_R, inverse_TK, topk_ids_TK, grad_TD, down_bias)
    return grad_x, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias


_expert_mlp_fp8_backward.register_fake(fake_backward)


_ExpertMLP = expert_function(
    torch.ops.dmoe.expert_mlp_fp8.default, torch.ops.dmoe.expert_mlp_fp8_backward.default, 'precision "fp8"'
)  # fmt: skip


def expert_mlp_fp8(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """`dmoe.ops.expert_mlp` with precision="fp8". D and F are multiples of 16.

    fp32 and fp16 tensors are rounded to bf16 first, 16 times finer than what follows, and the result has their dtype.
    A second derivative is a RuntimeError.

    Raises:
        ConfigError: a width is no multiple of 16, or the tensors are fp64.
    """
    if x_TD.dtype == torch.float64:
        raise ConfigError('expert_mlp: precision is "fp8" for an fp64 input: must be "same", or the input bf16 or fp32')
    for name, width in (("D, the width of x_TD,", x_TD.shape[1]), ("F, the width of down_proj,", down_proj.shape[2])):
        if width % ALIGNMENT:
            raise ConfigError(f'expert_mlp: {name} is {width}: must be a multiple of {ALIGNMENT} with precision "fp8"')
    parameters = (
        t if t is None else t.bfloat16().contiguous() for t in (gate_up_proj, down_proj, gate_up_bias, down_bias)
    )
    args = (x_TD.bfloat16().contiguous(), topk_ids_TK, topk_weights_TK.float(), *parameters, activation)
    may_resize = x_TD.device.type == "cpu" and not torch.compiler.is_compiling()
    if torch.is_grad_enabled():
        return _ExpertMLP.apply(*args, True, may_resize)[0].to(x_TD.dtype)
    return _expert_mlp_fp8(*args, False, may_resize)[0].to(x_TD.dtype)
