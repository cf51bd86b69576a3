"""Tensor descriptors over the rows of one expert: reading beyond them gives zeros, writing there does nothing.

A descriptor clips at the bounds of the whole tensor, while here the bound is an expert's last row, known on the device
alone. So the rows get a bound far beyond the tensor, BOUND, and coordinates are chosen such that an expert's last row
is the last before it. Two leading dimensions of one element each bring the address back: addresses are 64 bits and
wrap, and a stride of 2**34 - s in one and s in the other moves back by BOUND rows and forward by any number of rows:

    address / s = (BOUND - size + row) + (start + size) - BOUND = start + row     (mod 2**64, as BOUND * 2**34 = 2**64)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_BOUND = 2**30
BOUND = tl.constexpr(_BOUND)


def ragged_shape_and_strides(rows: Tensor) -> tuple[list[int], list[int]]:
    """Of the descriptor over `rows`, [R, ...] contiguous."""
    stride = rows.stride(0)
    shape = [2**31 - 65536, 2**31 - 65536, _BOUND, *rows.shape[1:]]
    return shape, [2**34 - stride, stride, *rows.stride()]


def ragged_descriptor(rows: Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor for `load_rows` and `store_rows`.

    Args:
        rows: [R, N] or, in parts, [R, P, N], contiguous.
        block: rows and columns of a tile; with parts, of one part.
    """
    block = [block[0], 1, block[1]] if rows.dim() == 3 else block
    return TensorDescriptor(rows, *ragged_shape_and_strides(rows), [1, 1, *block])


@triton.jit
def load_rows(desc, start, size, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] tile at `row` of the rows start .. start + size - 1, zeros beyond."""
    return tl.reshape(desc.load([BOUND, start + size, BOUND - size + row, col]), (ROWS, COLS))


@triton.jit
def store_rows(desc, start, size, row, col, tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store a tile at `row` of the rows start .. start + size - 1; nothing is written beyond."""
    desc.store([BOUND, start + size, BOUND - size + row, col], tl.reshape(tile, (1, 1, ROWS, COLS)))


@triton.jit
def store_part(desc, start, size, row, part, col, tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`store_rows` into one part of rows in parts."""
    desc.store([BOUND, start + size, BOUND - size + row, part, col], tl.reshape(tile, (1, 1, ROWS, 1, COLS)))
