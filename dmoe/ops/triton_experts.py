"""The triton backend: fused kernels over rows sorted by expert. For a GPU; the kernels are in `dmoe.ops.kernels`.

    forward    sort the picks | h = W1 x_token, a = s act(h) in one kernel | y = W2 a | sum of a token's K rows
    backward   gradient rows copied in the order of the experts | g = W2^T dout, with ds, dh and s a in one kernel
               | dW2 | dx rows = W1^T dh | sum of a token's K rows | dW1    (dW2 after dx, if that is to travel)

The maths and what is kept for the backward are those of the torch backend (`grouped.py`): x, the pre-activation
h, the routing weights and the permutation, here with 32-bit indices. Bytes a token beside x, with elements of b bytes:

    K * H * b  (h)  +  8 K  (order and its inverse)        and the caller's ids (4 or 8 K) and weights (4 K)

Picks of no expert are rows after the last expert's: no tile covers them, and what they hold is never read.

Sizes are those of the shapes alone and nothing is read back to the host, so that a CUDA graph can hold a step.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from dmoe.ops.aligned import with_aligned_widths
from dmoe.ops.early import InputGradients
from dmoe.ops.expert_autograd import expert_function, fake_backward, fake_forward, grad_weights_of_picks
from dmoe.ops.kernels.decode import DECODE_MAX_MEAN, DECODE_MAX_TOKENS, decode_mlp
from dmoe.ops.kernels.down_backward import down_backward
from dmoe.ops.kernels.launch import Tile
from dmoe.ops.kernels.products import rows_times_weights, weight_gradient
from dmoe.ops.kernels.rows import spread_rows, sum_picks_triton
from dmoe.ops.kernels.sorting import counting_sort
from dmoe.ops.kernels.tiles import RowTiles, row_tiles
from dmoe.ops.kernels.tuned import Tiles, choose_tiles
from dmoe.ops.kernels.up import up_projection
from dmoe.ops.permute import first_rows
from dmoe.ops.platform import is_hopper, on_its_device


def _tiles(x_TD: Tensor, num_rows: int, down_proj: Tensor) -> Tiles:
    num_experts, hidden_size, expert_width = down_proj.shape
    return choose_tiles(x_TD, hidden_size, expert_width, num_rows // num_experts)


_HAS_GLUON = find_spec("triton.experimental.gluon.nvidia.hopper") is not None


def _aligned(t: Tensor) -> Tensor:
    """For tensor descriptors, which start at multiples of 16 bytes; a part of a larger buffer may start anywhere."""
    return t if t.data_ptr() % 16 == 0 else t.clone()


def down_backward_here(
    grad_RD: Tensor, scale_R: Tensor, down_proj: Tensor, h_RH: Tensor, blocks: RowTiles, activation: str, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """`down_backward` in the form that this GPU runs fastest."""
    if _HAS_GLUON and is_hopper(h_RH.device):
        from dmoe.ops.kernels import hopper_down_backward as hopper

        if hopper.serves(h_RH, down_proj, blocks):
            return hopper.down_backward(grad_RD, scale_R, down_proj, h_RH, blocks, activation, tile.group_m)
    return down_backward(grad_RD, scale_R, down_proj, h_RH, blocks, activation, tile)


def _grad_down_bias(grad_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, num_experts: int) -> Tensor:
    """[E, D]: the sum of the gradients of an expert's tokens times their routing weights, as one dense product."""
    # A further column takes the weights of picks of no expert; four of them keep rows aligned. A token without an
    # expert has weights of 0 alone, but 0 * NaN is NaN.
    weights_TE = topk_weights_TK.new_zeros(grad_TD.shape[0], num_experts + 4).scatter_(
        1, topk_ids_TK.long(), topk_weights_TK
    )  # fmt: skip
    unused_T1 = (topk_ids_TK >= num_experts).all(dim=1, keepdim=True)
    grad = weights_TE[:, :num_experts].t() @ grad_TD.float().masked_fill(unused_T1, 0)
    return grad.to(grad_TD.dtype)


@torch.library.custom_op("dmoe::expert_mlp_triton", mutates_args=())
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
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns y_TD and, for the backward: h_RH (no rows unless `save`) and the three parts of the permutation."""
    gate_up_proj, down_proj = _aligned(gate_up_proj), _aligned(down_proj)
    permutation = counting_sort(topk_ids_TK, down_proj.shape[0])
    order_R, inverse_TK, offsets_E = permutation if num_rows is None else first_rows(permutation, num_rows)
    tiles = _tiles(x_TD, order_R.numel(), down_proj)
    scale_R = topk_weights_TK.reshape(-1).index_select(0, order_R)
    blocks = row_tiles(offsets_E, order_R.numel(), tiles.block_m)
    h_RH, a_RF = up_projection(
        x_TD, order_R, topk_ids_TK.shape[1], scale_R, gate_up_proj, gate_up_bias, blocks, down_proj.shape[2],
        activation, save, tiles.up,
    )  # fmt: skip
    y_RD = rows_times_weights(a_RF, down_proj, blocks, True, tiles.down, bias_EN=down_bias, scale_R=scale_R)
    return sum_picks_triton(y_RD, inverse_TK), h_RH, order_R, inverse_TK, offsets_E


_expert_mlp.register_fake(fake_forward(torch.int32))


@on_its_device
def _gradients(receiver: InputGradients | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the operator of the backward returns, of its arguments. With a `receiver` the gradients of x and of the
    routing weights come first and are handed to it then, at the price of more memory for a while."""
    grad_TD, x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, _, down_bias, *kept, activation, needs = args
    h_RH, order_R, inverse_TK, offsets_E = kept
    needs_x, needs_weights, needs_gate_up, needs_down, needs_gate_up_bias, needs_down_bias = needs
    none = [x_TD.new_empty(0) for _ in needs]  # an operator may not return one tensor twice
    grad_x, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias = none
    tiles = _tiles(x_TD, order_R.numel(), down_proj)
    blocks = row_tiles(offsets_E, order_R.numel(), tiles.block_m)
    scale_R = topk_weights_TK.reshape(-1).index_select(0, order_R)
    # Contiguous whatever the strides of the gradient: that of y.sum() is an expanded scalar.
    grad_TD = grad_TD.contiguous()
    gate_up_proj, down_proj = _aligned(gate_up_proj), _aligned(down_proj)

    grad_RD = spread_rows(grad_TD, inverse_TK, num_rows=order_R.numel())
    grad_h_RH, a_RF, grad_s_R = down_backward_here(
        grad_RD, scale_R, down_proj, h_RH, blocks, activation, tiles.down_backward
    )  # fmt: skip

    def input_gradients() -> tuple[Tensor, Tensor]:
        dx, dw = grad_x, grad_weights
        if needs_x:
            dx = sum_picks_triton(
                rows_times_weights(grad_h_RH, gate_up_proj, blocks, False, tiles.up_backward), inverse_TK
            )  # fmt: skip
        if needs_weights:
            dw = grad_weights_of_picks(grad_s_R, inverse_TK, topk_ids_TK, grad_TD, down_bias)
        return dx, dw

    if receiver is not None:
        grad_x, grad_weights = input_gradients()
        receiver(grad_x, grad_weights)
    if needs_down:
        grad_down = weight_gradient(grad_RD, a_RF, offsets_E, tiles.down_gradient)
    del grad_RD, a_RF  # as large as x K times over: room for what follows
    if receiver is None:
        grad_x, grad_weights = input_gradients()
    if needs_gate_up:
        x_RD = spread_rows(x_TD, inverse_TK, num_rows=order_R.numel())
        grad_gate_up = weight_gradient(grad_h_RH, x_RD, offsets_E, tiles.gate_up_gradient)
    if needs_gate_up_bias:
        ones_R8 = grad_h_RH.new_ones(grad_h_RH.shape[0], 8)
        grad_gate_up_bias = weight_gradient(grad_h_RH, ones_R8, offsets_E, tiles.gate_up_gradient)[:, :, 0].contiguous()
    if needs_down_bias:
        grad_down_bias = _grad_down_bias(grad_TD, topk_ids_TK, topk_weights_TK, down_proj.shape[0])
    return grad_x, grad_weights, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias


@torch.library.custom_op("dmoe::expert_mlp_triton_backward", mutates_args=())
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
    return _gradients(
        None, grad_TD, x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, gate_up_bias, down_bias,
        h_RH, order_R, inverse_TK, offsets_E, activation, needs,
    )  # fmt: skip


_expert_mlp_backward.register_fake(fake_backward)


@torch.library.custom_op("dmoe::expert_mlp_decode", mutates_args=())
@on_its_device
def _expert_mlp_decode(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
) -> Tensor:
    return decode_mlp(
        x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, gate_up_bias, down_bias, activation
    )  # fmt: skip


@_expert_mlp_decode.register_fake
def _(x_TD: Tensor, *args: Any) -> Tensor:
    return x_TD.new_empty(x_TD.shape)


_ExpertMLP = expert_function(
    torch.ops.dmoe.expert_mlp_triton.default,
    torch.ops.dmoe.expert_mlp_triton_backward.default,
    'backend "triton"',
    _gradients,
)


def _call(num_rows: int | None, x_TD: Tensor, *args: Any) -> Tensor:
    if torch.is_grad_enabled():
        return _ExpertMLP.apply(x_TD, *args, True, num_rows)[0]
    return _expert_mlp(x_TD, *args, False, num_rows)[0]


def expert_mlp_triton(
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
    """See `dmoe.ops.expert_mlp`. bf16, fp16, and fp32: through tf32 if that is allowed, else exact and slow.

    Few tokens without gradients take the kernels of `dmoe.ops.kernels.decode`. A second derivative is a RuntimeError.
    """
    few = x_TD.shape[0] <= DECODE_MAX_TOKENS and topk_ids_TK.numel() <= DECODE_MAX_MEAN * down_proj.shape[0]
    if few and not torch.is_grad_enabled():
        return _expert_mlp_decode(
            x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, gate_up_bias, down_bias, activation
        )  # fmt: skip
    return with_aligned_widths(
        partial(_call, num_rows),
        x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj, gate_up_bias, down_bias, activation,
    )  # fmt: skip
