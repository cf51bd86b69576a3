"""Grouped products: sorted rows times their expert's matrix, and the gradient of those matrices.

Legend: R rows sorted by expert, E experts, K the contracted width, M and N output widths. A persistent grid of one
program for each multiprocessor walks over the tiles; operands and results go through tensor descriptors, which on
Hopper are the copy engine (TMA) and elsewhere plain pointers. A descriptor over the rows of one expert ("ragged") reads
zeros beyond them and writes nothing there, so that an expert's last, partial block needs no path of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dmoe.ops.kernels.launch import Tile, num_programs
from dmoe.ops.kernels.ragged import load_rows, ragged_descriptor, store_rows
from dmoe.ops.kernels.tiles import RowTiles, halves, place
from dmoe.ops.precision import allows_tf32


@triton.jit
def _store_in_parts(
    desc, start, size, row, col, tile, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Part after part through one small buffer: that leaves shared memory for another stage of the pipeline."""
    if SPLIT == 1:
        store_rows(desc, start, size, row, col, tile.to(desc.dtype), ROWS, COLS)
    else:
        left, right = halves(tile, ROWS, COLS)
        _store_in_parts(desc, start, size, row, col, left, ROWS, COLS // 2, SPLIT // 2)
        _store_in_parts(desc, start, size, row, col + COLS // 2, right, ROWS, COLS // 2, SPLIT // 2)


@triton.jit
def _rows_kernel(
    x_desc, w_desc, y_desc, bias_ptr, scale_ptr, table_ptr, count_ptr, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    W_IS_NK: tl.constexpr, SPLIT: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    count = tl.load(count_ptr)
    num_n = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), count * num_n, tl.num_programs(0), flatten=FLATTEN):
        m, n = place(tile, count, num_n, GROUP_M)
        entry = table_ptr + m * 4
        expert = tl.load(entry)
        row = tl.load(entry + 1)
        start = tl.load(entry + 2)
        size = tl.load(entry + 3) - start
        col = n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])
            if W_IS_NK:
                w = tl.reshape(w_desc.load([expert, col, k]), (BLOCK_N, BLOCK_K)).T
            else:
                w = tl.reshape(w_desc.load([expert, k, col]), (BLOCK_K, BLOCK_N))
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if bias_ptr is not None:
            cols = col + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + expert * N + cols, mask=cols < N, other=0.0).to(tl.float32)
            scale = tl.load(scale_ptr + tl.minimum(row + tl.arange(0, BLOCK_M), start + size - 1))
            acc += scale[:, None] * bias[None, :]
        _store_in_parts(y_desc, start, size, row - start, col, acc, BLOCK_M, BLOCK_N, SPLIT)


def rows_times_weights(
    x_RK: Tensor, w_E: Tensor, tiles: RowTiles, transpose_weights: bool, tile: Tile, *,
    bias_EN: Tensor | None = None, scale_R: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[R, N]: each expert's rows times its matrix: w_E is [E, N, K] with `transpose_weights`, else [E, K, N].

    Contiguous; K and N multiples of 16 bytes. Every row that belongs to an expert is written. With `bias_EN`,
    scale_R[r] times its expert's bias is added to row r; the scale is fp32.
    """
    num_rows, K = x_RK.shape
    N = w_E.shape[1] if transpose_weights else w_E.shape[2]
    y_RN = x_RK.new_empty(num_rows, N)
    if num_rows == 0:
        return y_RN
    w_block = [1, tile.block_n, tile.block_k] if transpose_weights else [1, tile.block_k, tile.block_n]
    _rows_kernel[(num_programs(x_RK.device),)](
        TensorDescriptor.from_tensor(x_RK, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(w_E, w_block),
        ragged_descriptor(y_RN, [tile.block_m, tile.block_n // tile.split]),
        bias_EN, scale_R, tiles.table_M4, tiles.used_1, N, K,
        tile.block_m, tile.block_n, tile.block_k, tile.group_m, transpose_weights, tile.split, tile.flatten,
        precision(x_RK.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y_RN


@triton.jit(do_not_specialize=["E"])
def _weight_gradient_kernel(
    left_desc, right_desc, grad_desc, offsets_ptr, E, M, N,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    per_expert = num_m * num_n
    dtype = grad_desc.dtype
    for tile in tl.range(tl.program_id(0), E * per_expert, tl.num_programs(0), flatten=FLATTEN):
        expert = tile // per_expert
        m, n = place(tile - expert * per_expert, num_m, num_n, GROUP_M)
        start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
        size = tl.load(offsets_ptr + expert) - start
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, size, BLOCK_K):
            # Zeros beyond the expert in both: a NaN of the next expert times 0 would be NaN.
            left = load_rows(left_desc, start, size, k, m * BLOCK_M, BLOCK_K, BLOCK_M)
            right = load_rows(right_desc, start, size, k, n * BLOCK_N, BLOCK_K, BLOCK_N)
            acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
        if SPLIT == 1:
            grad_desc.store([expert, m * BLOCK_M, n * BLOCK_N], tl.reshape(acc.to(dtype), (1, BLOCK_M, BLOCK_N)))
        else:
            half: tl.constexpr = BLOCK_N // 2
            a, b = halves(acc, BLOCK_M, BLOCK_N)
            grad_desc.store([expert, m * BLOCK_M, n * BLOCK_N], tl.reshape(a.to(dtype), (1, BLOCK_M, half)))
            grad_desc.store([expert, m * BLOCK_M, n * BLOCK_N + half], tl.reshape(b.to(dtype), (1, BLOCK_M, half)))


def weight_gradient(left_RM: Tensor, right_RN: Tensor, offsets_E: Tensor, tile: Tile) -> Tensor:
    """[E, M, N]: the sum over each expert's rows of left (outer) right; zeros for an expert without rows."""
    num_experts, M, N = offsets_E.numel(), left_RM.shape[1], right_RN.shape[1]
    grad_EMN = left_RM.new_empty(num_experts, M, N)
    if left_RM.shape[0] == 0:
        return grad_EMN.zero_()
    _weight_gradient_kernel[(num_programs(left_RM.device),)](
        ragged_descriptor(left_RM, [tile.block_k, tile.block_m]),
        ragged_descriptor(right_RN, [tile.block_k, tile.block_n]),
        TensorDescriptor.from_tensor(grad_EMN, [1, tile.block_m, tile.block_n // tile.split]),
        offsets_E, num_experts, M, N,
        tile.block_m, tile.block_n, tile.block_k, tile.group_m, tile.split, tile.flatten,
        precision(left_RM.dtype), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad_EMN


def precision(dtype: torch.dtype) -> str:
    """How a product of fp32 tiles is computed: through tf32 if that was asked for, else exactly."""
    return "tf32" if dtype != torch.float32 or allows_tf32() else "ieee"
