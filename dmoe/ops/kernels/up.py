"""The first product of the experts with what surrounds it: gather of the tokens, bias, activation, routing weight.

Legend: T tokens, D width, K picks, R = T*K rows sorted by expert, E experts, F expert width, P = 2 parts (gate, up) of
a gated expert, 1 of a plain one.

The activation is computed from the fp32 accumulators; the pre-activation is written beside it, for the backward, only
if asked for.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dmoe.ops.kernels.activations import gated, pointwise
from dmoe.ops.kernels.launch import Tile, num_programs
from dmoe.ops.kernels.products import precision
from dmoe.ops.kernels.ragged import ragged_descriptor, store_part, store_rows
from dmoe.ops.kernels.tiles import RowTiles, halves, place


@triton.jit
def _activate_and_store(
    gate, up, scale, h_desc, a_desc, start, size, row, col, ROWS: tl.constexpr, COLS: tl.constexpr,
    SPLIT: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    if SPLIT == 1:
        dtype = a_desc.dtype
        if SAVE:
            if PARTS == 2:
                store_part(h_desc, start, size, row, 0, col, gate.to(dtype), ROWS, COLS)
            store_part(h_desc, start, size, row, PARTS - 1, col, up.to(dtype), ROWS, COLS)
        a = gated(gate, up, ACT) if PARTS == 2 else pointwise(up, ACT)
        store_rows(a_desc, start, size, row, col, (a * scale[:, None]).to(dtype), ROWS, COLS)
    else:
        half: tl.constexpr = COLS // 2
        gate_0, gate_1 = halves(gate, ROWS, COLS)
        up_0, up_1 = halves(up, ROWS, COLS)
        _activate_and_store(
            gate_0, up_0, scale, h_desc, a_desc, start, size, row, col, ROWS, half, SPLIT // 2, PARTS, ACT, SAVE
        )  # fmt: skip
        _activate_and_store(
            gate_1, up_1, scale, h_desc, a_desc, start, size, row, col + half, ROWS, half, SPLIT // 2, PARTS, ACT, SAVE
        )  # fmt: skip


@triton.jit
def _up_kernel(
    x_ptr, w_desc, bias_ptr, h_desc, a_desc, order_ptr, scale_ptr, table_ptr, count_ptr, D, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    TOP_K: tl.constexpr, ACT: tl.constexpr, PARTS: tl.constexpr, SAVE: tl.constexpr, EVEN_D: tl.constexpr,
    SPLIT: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr)
    num_n = tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), count * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = place(tile, count, num_n, GROUP_M)
        entry = table_ptr + m * 4
        expert = tl.load(entry)
        row = tl.load(entry + 1)
        start = tl.load(entry + 2)
        end = tl.load(entry + 3)
        col = n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        # Rows beyond the expert repeat its last one: every load is in bounds and none needs a mask.
        tokens = tl.load(order_ptr + tl.minimum(rows, end - 1)) // TOP_K
        x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * D + tl.arange(0, BLOCK_K)[None, :]
        # Gate and up columns side by side, as one product: one read of x, and one accumulator.
        h = tl.zeros((BLOCK_M, PARTS * BLOCK_N), dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            if EVEN_D:
                x = tl.load(x_ptrs + k)
            else:
                x = tl.load(x_ptrs + k, mask=tl.arange(0, BLOCK_K)[None, :] < D - k, other=0.0)
            w = tl.reshape(w_desc.load([expert, 0, col, k]), (PARTS * BLOCK_N, BLOCK_K))
            h = tl.dot(x, w.T, h, input_precision=PRECISION)
        if PARTS == 2:
            gate, up = halves(h, BLOCK_M, 2 * BLOCK_N)
        else:
            gate, up = h, h
        if bias_ptr is not None:
            cols = col + tl.arange(0, BLOCK_N)
            if PARTS == 2:
                gate += tl.load(bias_ptr + expert * 2 * F + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
            last = bias_ptr + (expert * PARTS + PARTS - 1) * F
            up += tl.load(last + cols, mask=cols < F, other=0.0).to(tl.float32)[None, :]
        scale = tl.load(scale_ptr + tl.minimum(rows, end - 1))
        size = end - start
        _activate_and_store(
            gate, up, scale, h_desc, a_desc, start, size, row - start, col, BLOCK_M, BLOCK_N, SPLIT, PARTS, ACT, SAVE
        )  # fmt: skip


def up_projection(
    x_TD: Tensor, order_R: Tensor, top_k: int, scale_R: Tensor, gate_up: Tensor, bias: Tensor | None,
    tiles: RowTiles, expert_width: int, activation: str, save: bool, tile: Tile,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h = W1 x, with x the token of each row, and a = s * act(h).

    Args:
        order_R: int32, the pick of each row: its token is order_R[r] // top_k.
        scale_R: fp32 routing weight of each row.
        gate_up: [E, P*F, D]; bias: [E, P*F].
        tile: block_n counts columns of the activation, of which there are P in the product.

    Returns:
        h_RH (no rows unless `save`) and a_RF.
    """
    num_rows, D = scale_R.numel(), x_TD.shape[1]
    parts = gate_up.shape[1] // expert_width
    h_RH = x_TD.new_empty(num_rows if save else 0, parts * expert_width)
    a_RF = x_TD.new_empty(num_rows, expert_width)
    if num_rows == 0:
        return h_RH, a_RF
    h_desc = (
        ragged_descriptor(h_RH.view(-1, parts, expert_width), [tile.block_m, tile.block_n // tile.split])
        if save
        else None
    )
    _up_kernel[(num_programs(x_TD.device),)](
        x_TD, TensorDescriptor.from_tensor(gate_up.unflatten(1, (parts, -1)), [1, parts, tile.block_n, tile.block_k]),
        bias, h_desc, ragged_descriptor(a_RF, [tile.block_m, tile.block_n // tile.split]), order_R, scale_R,
        tiles.table_M4, tiles.used_1, D, expert_width,
        tile.block_m, tile.block_n, tile.block_k, tile.group_m,
        top_k, activation, parts, save, D % tile.block_k == 0, tile.split, tile.flatten, precision(x_TD.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return h_RH, a_RF
