"""Backward of the second product with what surrounds it: derivative of the activation, gradient of the routing weights.

With row r of expert e, its routing weight s and pre-activation h (legend in `up.py`):

    g = W2_e^T dout_r     a = act(h)     ds_r = <g, a>     dh = act'(h) * (s g)     sa = s a, for the gradient of W2_e

The activation is recomputed from h, and ds needs no output of the experts (SonicMoE, arXiv:2512.14080): <dout, W2 a> is
<W2^T dout, a>.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dmoe.ops.kernels.activations import gated_with_derivative, pointwise_with_derivative
from dmoe.ops.kernels.launch import Tile, num_programs
from dmoe.ops.kernels.products import precision
from dmoe.ops.kernels.ragged import ragged_descriptor, store_part, store_rows
from dmoe.ops.kernels.tiles import RowTiles, halves, place


@triton.jit
def _load_h(h_ptr, rows, cols, F, PARTS: tl.constexpr):
    """Gate and up columns of the pre-activation; for plain experts twice the same."""
    row_ptr = h_ptr + rows.to(tl.int64)[:, None] * (PARTS * F) + cols[None, :]
    mask = cols[None, :] < F
    gate = tl.load(row_ptr, mask=mask, other=0.0)
    up = tl.load(row_ptr + F, mask=mask, other=0.0) if PARTS == 2 else gate
    return gate, up


@triton.jit
def _activation_backward(
    g, s, gate, up, dh_desc, sa_desc, start, size, row, col, ROWS: tl.constexpr, COLS: tl.constexpr,
    ACT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Writes dh and s a of one tile; returns its share of ds."""
    dtype = sa_desc.dtype
    up = up.to(tl.float32)
    if PARTS == 2:
        a, d_gate, d_up = gated_with_derivative(gate.to(tl.float32), up, g * s[:, None], ACT)
        store_part(dh_desc, start, size, row, 0, col, d_gate.to(dtype), ROWS, COLS)
    else:
        a, slope = pointwise_with_derivative(up, ACT)
        d_up = g * s[:, None] * slope
    store_part(dh_desc, start, size, row, PARTS - 1, col, d_up.to(dtype), ROWS, COLS)
    store_rows(sa_desc, start, size, row, col, (a * s[:, None]).to(dtype), ROWS, COLS)
    return tl.sum(g * a, axis=1)


@triton.jit(do_not_specialize=["num_rows"])
def _down_backward_kernel(
    grad_desc, w_desc, h_ptr, dh_desc, sa_desc, ds_ptr, scale_ptr, table_ptr, count_ptr, num_rows, D, F,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACT: tl.constexpr, PARTS: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr)
    num_n = tl.cdiv(F, BLOCK_N)
    quarter: tl.constexpr = BLOCK_N // 4
    for tile in tl.range(tl.program_id(0), count * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = place(tile, count, num_n, GROUP_M)
        entry = table_ptr + m * 4
        expert = tl.load(entry)
        row = tl.load(entry + 1)
        start = tl.load(entry + 2)
        end = tl.load(entry + 3)
        size = end - start
        col = n * BLOCK_N
        rows = row + tl.arange(0, BLOCK_M)
        inside = tl.minimum(rows, end - 1)
        cols = col + tl.arange(0, quarter)
        g = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, D, BLOCK_K):
            grad = grad_desc.load([row, k])
            w = tl.reshape(w_desc.load([expert, k, col]), (BLOCK_K, BLOCK_N))
            g = tl.dot(grad, w, g, input_precision=PRECISION)
        s = tl.load(scale_ptr + inside)
        gate_0, up_0 = _load_h(h_ptr, inside, cols, F, PARTS)
        # A quarter at a time, because a whole tile and its temporaries need too many registers; the pre-activation of
        # the next one is asked for before the last one is computed.
        g_01, g_23 = halves(g, BLOCK_M, BLOCK_N)
        g_0, g_1 = halves(g_01, BLOCK_M, BLOCK_N // 2)
        g_2, g_3 = halves(g_23, BLOCK_M, BLOCK_N // 2)
        gate_1, up_1 = _load_h(h_ptr, inside, cols + quarter, F, PARTS)
        ds = _activation_backward(
            g_0, s, gate_0, up_0, dh_desc, sa_desc, start, size, row - start, col, BLOCK_M, quarter, ACT, PARTS
        )  # fmt: skip
        gate_2, up_2 = _load_h(h_ptr, inside, cols + 2 * quarter, F, PARTS)
        ds += _activation_backward(
            g_1, s, gate_1, up_1, dh_desc, sa_desc, start, size, row - start, col + quarter,
            BLOCK_M, quarter, ACT, PARTS,
        )  # fmt: skip
        gate_3, up_3 = _load_h(h_ptr, inside, cols + 3 * quarter, F, PARTS)
        ds += _activation_backward(
            g_2, s, gate_2, up_2, dh_desc, sa_desc, start, size, row - start, col + 2 * quarter, BLOCK_M, quarter, ACT,
            PARTS,
        )  # fmt: skip
        ds += _activation_backward(
            g_3, s, gate_3, up_3, dh_desc, sa_desc, start, size, row - start, col + 3 * quarter, BLOCK_M, quarter, ACT,
            PARTS,
        )  # fmt: skip
        tl.store(ds_ptr + n.to(tl.int64) * num_rows + rows, ds, mask=rows < end)


def down_backward(
    grad_RD: Tensor, scale_R: Tensor, down: Tensor, h_RH: Tensor, tiles: RowTiles, activation: str, tile: Tile
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the pre-activation, of the routing weights, and the activation again.

    Args:
        grad_RD: the output gradient of each row's token, without its routing weight.
        down: [E, D, F]; h_RH: the pre-activation.

    Returns:
        dh_RH, sa_RF (both as `h_RH`), ds_R in fp32.
    """
    num_rows, D = grad_RD.shape
    F = down.shape[2]
    parts = h_RH.shape[1] // F
    dh_RH, sa_RF = torch.empty_like(h_RH), h_RH.new_empty(num_rows, F)
    # One row for each block of columns, added in a fixed order afterwards.
    ds_NR = scale_R.new_empty(triton.cdiv(F, tile.block_n), num_rows)
    if num_rows == 0:
        return dh_RH, sa_RF, scale_R.new_empty(0)
    part_block = [tile.block_m, tile.block_n // 4]
    _down_backward_kernel[(num_programs(grad_RD.device),)](
        TensorDescriptor.from_tensor(grad_RD, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(down, [1, tile.block_k, tile.block_n]),
        h_RH,
        ragged_descriptor(dh_RH.view(-1, parts, F), part_block),
        ragged_descriptor(sa_RF, part_block),
        ds_NR, scale_R, tiles.table_M4, tiles.used_1, num_rows, D, F,
        tile.block_m, tile.block_n, tile.block_k, tile.group_m,
        activation, parts, tile.flatten, precision(grad_RD.dtype),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dh_RH, sa_RF, ds_NR.sum(dim=0)
