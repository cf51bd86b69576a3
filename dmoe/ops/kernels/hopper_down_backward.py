"""`down_backward` for Hopper, in Gluon: separate warps load and multiply.

What `down_backward.py` loses is time at the end of a tile, when the multiplying warps wait for the pre-activation and
nothing is loaded for the next product. Here two warps load for the eight that multiply: one brings gradients and
weights, through a ring of stages, and runs on into the next tile; the other brings the pre-activation, in chunks of
columns through two pairs of buffers, which leave with its gradient. Each ring has two barriers a stage, `full` and
`empty`, whose phase flips with every use.

The maths and the arguments are those of `down_backward.py`; gated experts whose widths are multiples of 64.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dmoe.ops.kernels.activations import gated_with_derivative
from dmoe.ops.kernels.hardware import prefetch
from dmoe.ops.kernels.launch import num_programs
from dmoe.ops.kernels.ragged import BOUND, ragged_shape_and_strides
from dmoe.ops.kernels.tiles import RowTiles, halves, place

_CHUNK = 64
CHUNK = gl.constexpr(_CHUNK)
# Renamed: the barrier in Triton 3.7, the copies in 3.9.
_barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
_start_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_start_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def _ring(STAGES: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    return full, empty


@gluon.jit
def _wait_empty(empty, i, STAGES: gl.constexpr):
    """Until stage i % STAGES may be written; at once in the first round."""
    mbarrier.wait(empty.index(i % STAGES), ((i // STAGES) & 1) ^ 1)


@gluon.jit
def _load_operands(
    grad_desc, w_desc, grad_bufs, w_bufs, full, empty, table_ptr, count_ptr, D, F,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    count = gl.load(count_ptr)
    num_n = gl.cdiv(F, BLOCK_N)
    i = 0
    for tile in range(gl.program_id(0), count * num_n, gl.num_programs(0)):
        m, n = place(tile, count, num_n, GROUP_M)
        w_row = gl.load(table_ptr + m * 4) * D
        row = gl.load(table_ptr + m * 4 + 1)
        for k in range(0, D, BLOCK_K):
            stage = i % STAGES
            _wait_empty(empty, i, STAGES)
            mbarrier.expect(full.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K * 2)
            _start_load(grad_desc, [row, k], full.index(stage), grad_bufs.index(stage))
            _start_load(w_desc, [w_row + k, n * BLOCK_N], full.index(stage), w_bufs.index(stage))
            i += 1


@gluon.jit
def _load_h(
    h_ptr, h_desc, h_bufs, full, empty, table_ptr, count_ptr, F,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
):  # fmt: skip
    """Gate and up columns of a chunk into a pair of buffers."""
    count = gl.load(count_ptr)
    num_n = gl.cdiv(F, BLOCK_N)
    i = 0
    for tile in range(gl.program_id(0), count * num_n, gl.num_programs(0)):
        m, n = place(tile, count, num_n, GROUP_M)
        row = gl.load(table_ptr + m * 4 + 1)
        end = gl.load(table_ptr + m * 4 + 3)
        col = n * BLOCK_N
        for first in range(col, gl.minimum(col + BLOCK_N, F), CHUNK):
            pair = i % 2
            _wait_empty(empty, i, 2)
            mbarrier.expect(full.index(pair), 2 * BLOCK_M * CHUNK * 2)
            _start_load(h_desc, [row, first], full.index(pair), h_bufs.index(2 * pair))
            _start_load(h_desc, [row, F + first], full.index(pair), h_bufs.index(2 * pair + 1))
            i += 1
            if first == col + CHUNK:
                _prefetch_chunks(h_ptr, row, end, first + CHUNK, F, BLOCK_M)


@gluon.jit
def _prefetch_chunks(h_ptr, row, end, col, F, BLOCK_M: gl.constexpr):
    """The next two chunks on their way to the L2 cache, long before a buffer is free for them. A line of the cache is a
    row of a chunk."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [8, 4], [1, 1], [1, 0])
    rows = gl.minimum(row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout)), end - 1).to(gl.int64)
    piece = gl.arange(0, 4, layout=gl.SliceLayout(0, layout))
    cols = gl.minimum(col + piece % 2 * CHUNK, F - CHUNK) + piece // 2 * F
    prefetch(h_ptr + rows[:, None] * (2 * F) + cols[None, :])


@gluon.jit
def _store_rows(desc, start, size, row, col, buf, BLOCK_M: gl.constexpr):
    """As `ragged.store_rows`, from shared memory; it goes on in the background."""
    _start_store(
        desc, [BOUND, start + size, BOUND - size + row, col], buf.reshape([1, 1, BLOCK_M, CHUNK])
    )  # fmt: skip


@gluon.jit
def _finish_chunk(
    g, s, i, is_first, h_bufs, sa_buf, h_full, h_empty, dh_desc, sa_desc, start, size, row, col, F,
    BLOCK_M: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """dh and s a of chunk i, in the buffers that brought h; returns its share of ds."""
    pair = i % 2
    scale = gl.convert_layout(s, gl.SliceLayout(1, g.type.layout))[:, None]
    mbarrier.wait(h_full.index(pair), (i // 2) & 1)
    gate = h_bufs.index(2 * pair).load(g.type.layout).to(gl.float32)
    up = h_bufs.index(2 * pair + 1).load(g.type.layout).to(gl.float32)
    a, d_gate, d_up = gated_with_derivative(gate, up, g * scale, ACT)
    ds = gl.sum(g * a, axis=1)
    tma.store_wait(0)  # the chunk before has left its buffers
    _barrier()
    mbarrier.arrive(h_empty.index((i + 1) % 2), pred=not is_first)
    h_bufs.index(2 * pair).store(d_gate.to(h_bufs.dtype))
    h_bufs.index(2 * pair + 1).store(d_up.to(h_bufs.dtype))
    sa_buf.store((a * scale).to(h_bufs.dtype))
    fence_async_shared()
    _barrier()
    _store_rows(dh_desc, start, size, row, col, h_bufs.index(2 * pair), BLOCK_M)
    _store_rows(dh_desc, start, size, row, F + col, h_bufs.index(2 * pair + 1), BLOCK_M)
    _store_rows(sa_desc, start, size, row, col, sa_buf, BLOCK_M)
    return gl.convert_layout(ds, s.type.layout)


@gluon.jit
def _multiply(
    grad_bufs, w_bufs, full, empty, i, steps, acc_layout: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sum of `steps` products from iteration i on. A stage is freed when the product after its own has begun."""
    acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, acc_layout)
    for step in range(0, steps):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        acc = warpgroup_mma(grad_bufs.index(stage), w_bufs.index(stage), acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
        if step > 0:
            _barrier()
            mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES))
        i += 1
    acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
    _barrier()
    mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES))
    return acc, i


@gluon.jit
def _multiply_and_finish(
    grad_bufs, w_bufs, full, empty, h_bufs, sa_buf, h_full, h_empty, dh_desc, sa_desc, ds_ptr, scale_ptr,
    table_ptr, count_ptr, num_rows, D, F,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, ACT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_N, 16]
    )
    count = gl.load(count_ptr)
    num_n = gl.cdiv(F, BLOCK_N)
    i = 0
    chunk = 0
    for tile in range(gl.program_id(0), count * num_n, gl.num_programs(0)):
        m, n = place(tile, count, num_n, GROUP_M)
        row = gl.load(table_ptr + m * 4 + 1)
        start = gl.load(table_ptr + m * 4 + 2)
        end = gl.load(table_ptr + m * 4 + 3)
        g, i = _multiply(
            grad_bufs, w_bufs, full, empty, i, gl.cdiv(D, BLOCK_K), acc_layout, BLOCK_M, BLOCK_N, STAGES
        )  # fmt: skip
        rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, acc_layout))
        s = gl.load(scale_ptr + gl.minimum(rows, end - 1))
        g_01, g_23 = halves(g, BLOCK_M, BLOCK_N)
        g_0, g_1 = halves(g_01, BLOCK_M, BLOCK_N // 2)
        g_2, g_3 = halves(g_23, BLOCK_M, BLOCK_N // 2)
        parts = (g_0, g_1, g_2, g_3)
        ds = gl.zeros((BLOCK_M,), gl.float32, gl.SliceLayout(1, acc_layout))
        for part in gl.static_range(4):
            col = n * BLOCK_N + part * CHUNK
            if col < F:
                ds += _finish_chunk(
                    parts[part], s, chunk, part == 0, h_bufs, sa_buf, h_full, h_empty, dh_desc, sa_desc,
                    start, end - start, row - start, col, F, BLOCK_M, ACT,
                )  # fmt: skip
                chunk += 1
        tma.store_wait(0)
        _barrier()
        mbarrier.arrive(h_empty.index((chunk + 1) % 2))
        gl.store(ds_ptr + n.to(gl.int64) * num_rows + rows, ds, mask=rows < end)


@gluon.jit(do_not_specialize=["num_rows"])
def _kernel(
    grad_desc, w_desc, h_ptr, h_desc, dh_desc, sa_desc, ds_ptr, scale_ptr, table_ptr, count_ptr, num_rows, D, F,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    ACT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    gl.static_assert(BLOCK_N == 4 * CHUNK)
    dtype: gl.constexpr = w_desc.dtype
    grad_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], grad_desc.layout)
    w_bufs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], w_desc.layout)
    h_bufs = gl.allocate_shared_memory(dtype, [4, BLOCK_M, CHUNK], h_desc.layout)
    sa_buf = gl.allocate_shared_memory(dtype, [BLOCK_M, CHUNK], h_desc.layout)
    full, empty = _ring(STAGES)
    h_full, h_empty = _ring(2)
    fence_async_shared()
    gl.warp_specialize([
        (_multiply_and_finish, (
            grad_bufs, w_bufs, full, empty, h_bufs, sa_buf, h_full, h_empty, dh_desc, sa_desc, ds_ptr, scale_ptr,
            table_ptr, count_ptr, num_rows, D, F, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, ACT, STAGES,
        )),
        (_load_operands, (
            grad_desc, w_desc, grad_bufs, w_bufs, full, empty, table_ptr, count_ptr, D, F,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, STAGES,
        )),
        (_load_h, (h_ptr, h_desc, h_bufs, h_full, h_empty, table_ptr, count_ptr, F, BLOCK_M, BLOCK_N, GROUP_M)),
    ], [1, 1], [24, 40])  # fmt: skip


def serves(h_RH: Tensor, down: Tensor, tiles: RowTiles) -> bool:
    """Whether this kernel takes the problem: gated experts, bf16 or fp16, widths of multiples of 64."""
    _, D, F = down.shape
    gated = h_RH.shape[1] == 2 * F
    return gated and h_RH.shape[0] > 0 and h_RH.element_size() == 2 and not (D % 64 or F % 64) and tiles.block_m == 128


def _descriptor(tensor: Tensor, block: list[int], *, ragged: bool = False) -> TensorDescriptor:
    shape, strides = list(tensor.shape), list(tensor.stride())
    if ragged:
        shape, strides = ragged_shape_and_strides(tensor)
        block = [1, 1, *block]
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor(tensor, shape, strides, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def down_backward(
    grad_RD: Tensor, scale_R: Tensor, down: Tensor, h_RH: Tensor, tiles: RowTiles, activation: str, group_m: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """As `dmoe.ops.kernels.down_backward.down_backward`, where `serves` says so."""
    num_rows, (_, D, F) = grad_RD.shape[0], down.shape
    block_m, block_n, block_k, stages = tiles.block_m, 4 * _CHUNK, 64, 3
    dh_RH, sa_RF = torch.empty_like(h_RH), h_RH.new_empty(num_rows, F)
    ds_NR = scale_R.new_empty(triton.cdiv(F, block_n), num_rows)
    _kernel[(num_programs(h_RH.device),)](
        _descriptor(grad_RD, [block_m, block_k]), _descriptor(down.flatten(0, 1), [block_k, block_n]),
        h_RH, _descriptor(h_RH, [block_m, _CHUNK]),
        _descriptor(dh_RH, [block_m, _CHUNK], ragged=True), _descriptor(sa_RF, [block_m, _CHUNK], ragged=True),
        ds_NR, scale_R, tiles.table_M4, tiles.used_1, num_rows, D, F,
        block_m, block_n, block_k, group_m, activation, stages, num_warps=8,
    )  # fmt: skip
    return dh_RH, sa_RF, ds_NR.sum(dim=0)
