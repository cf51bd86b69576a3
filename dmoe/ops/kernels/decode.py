"""Experts for few tokens, forward only: as fast as the weights of the chosen experts can be read.

With few tokens every weight is used a handful of times, so time is the bytes of the chosen experts over the memory's
bandwidth. Two ways, because what keeps the memory busy differs:

* per token: a program owns a few weight rows of one pick and multiplies on the ordinary cores. Two launches, no
  grouping; an expert chosen by two tokens is read twice (the second time usually from L2).
* grouped: picks are grouped by expert, and a program multiplies a tile of weight rows with up to `rows` picks of one
  expert on the tensor cores, so weights are read once for all of them. The weights are the left operand: a tensor
  core wants 64 rows there, which weights have and picks do not, while 16 columns suffice on the right. Four launches.

Picks of no expert (id E) are not computed, and left out of the sum over picks.

No host synchronisation, no shape that depends on the routing, no atomics: equal inputs give equal bits.

Legend: T tokens, D width, K picks a token, R = T*K picks, E experts, F expert width, H = 2F (gated) or F. Constants in
capitals: ROWS picks a tile, N weight rows a tile, C columns of the summed dimension a step.
"""

# mypy: disable-error-code="no-untyped-def, import-untyped"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe.ops.kernels.activations import gated, pointwise

DECODE_MAX_TOKENS = 256
DECODE_MAX_MEAN = 32
"""Above this many tokens, or picks an expert on average, the tile kernels for long batches are the better choice."""


@dataclass(frozen=True)
class DecodeTile:
    """N weight rows x C columns a step, with the warps of a program and the loads in flight."""

    n: int
    c: int
    warps: int
    stages: int


@dataclass(frozen=True)
class DecodeTiles:
    """Tile choices of one call. `rows` picks a tile; 0 is the per-token way."""

    rows: int
    up: DecodeTile
    down: DecodeTile


# The only tile choices. benchmarks/decode.py --sweep measures others.
PER_TOKEN = DecodeTiles(rows=0, up=DecodeTile(4, 512, 4, 3), down=DecodeTile(4, 256, 4, 1))
GROUPED = {
    16: DecodeTiles(rows=16, up=DecodeTile(32, 128, 4, 4), down=DecodeTile(64, 128, 4, 4)),
    32: DecodeTiles(rows=32, up=DecodeTile(64, 64, 4, 4), down=DecodeTile(64, 128, 4, 4)),
    64: DecodeTiles(rows=64, up=DecodeTile(64, 64, 4, 4), down=DecodeTile(128, 64, 4, 4)),
}
_PER_TOKEN_MAX_PICKS = 16  # a token's picks lie side by side in one tile


def choose_decode_tiles(num_tokens: int, top_k: int, num_experts: int) -> DecodeTiles:
    """The way and its tiles, from the shape alone: what is chosen may not depend on the routing."""
    picks = num_tokens * top_k
    if top_k <= _PER_TOKEN_MAX_PICKS and (num_tokens == 1 or 8 * picks <= num_experts):
        return PER_TOKEN
    mean = picks / num_experts
    return GROUPED[16 if mean <= 10 else 32 if mean <= 24 else 64]


@triton.jit
def _activate(gate, up, ACT: tl.constexpr, GATED: tl.constexpr):
    return gated(gate, up, ACT) if GATED else pointwise(gate, ACT)


@triton.jit
def _load(pointers, columns, width, EVEN: tl.constexpr):
    """A tile whose last dimension is `columns`; zeros beyond `width`."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns < width, other=0.0)


@triton.jit(do_not_specialize=["top_k"])
def _up_per_token(
    x_ptr, ids_ptr, scale_ptr, w_ptr, bias_ptr, a_ptr, width, expert_width, top_k, num_experts,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """a[r, f] = weight[r] * act(W1[id_r] x_t)[f] for N values of f, one pick r of token t. Grid (F/N, R)."""
    r = tl.program_id(1)
    e = tl.load(ids_ptr + r).to(tl.int64)
    if e >= num_experts:
        return
    f = tl.program_id(0) * N + tl.arange(0, N)
    # Rows beyond the last repeat it: a load that hits the cache costs less than a mask.
    row = tl.minimum(f, expert_width - 1)
    c = tl.arange(0, C)
    halves = 2 if GATED else 1
    gate_ptrs = w_ptr + e * halves * expert_width * width + row[:, None] * width + c[None, :]
    up_ptrs = gate_ptrs + expert_width * width
    x_ptrs = x_ptr + (r // top_k) * width + c
    gate = tl.zeros([N, C], tl.float32)
    up = tl.zeros([N, C], tl.float32)
    for start in tl.range(0, width, C, num_stages=STAGES):
        x = _load(x_ptrs + start, start + c, width, EVEN).to(tl.float32)[None, :]
        gate += _load(gate_ptrs + start, start + c[None, :], width, EVEN).to(tl.float32) * x
        if GATED:
            up += _load(up_ptrs + start, start + c[None, :], width, EVEN).to(tl.float32) * x
    gate_n, up_n = tl.sum(gate, axis=1), tl.sum(up, axis=1)
    if BIAS:
        bias_ptrs = bias_ptr + e * halves * expert_width + row
        gate_n += tl.load(bias_ptrs).to(tl.float32)
        if GATED:
            up_n += tl.load(bias_ptrs + expert_width).to(tl.float32)
    a = _activate(gate_n, up_n, ACT, GATED) * tl.load(scale_ptr + r)
    tl.store(a_ptr + r * expert_width + f, a.to(a_ptr.dtype.element_ty), mask=f < expert_width)


@triton.jit(do_not_specialize=["top_k"])
def _down_per_token(
    a_ptr, ids_ptr, scale_ptr, w_ptr, bias_ptr, y_ptr, width, expert_width, top_k, num_experts,
    BIAS: tl.constexpr, PICKS: tl.constexpr, ALL: tl.constexpr,
    N: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[t, d] = sum over k of W2[id_k] a_k for N values of d and one token. Grid (D/N, T).

    All picks of the token in one tile [PICKS, N, C]: the loop over columns then never waits for another expert's id.
    """
    t = tl.program_id(1)
    d = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.minimum(d, width - 1)
    k = tl.arange(0, PICKS)
    e = tl.load(ids_ptr + t * top_k + k, mask=k < top_k, other=num_experts).to(tl.int64)
    kept = e < num_experts
    # A pick of no expert reads the weights of another pick, which are read anyway, and a token without any reads none.
    some = tl.max(tl.where(kept, e, -1), axis=0)
    e = tl.where(kept, e, tl.maximum(some, 0))
    end = expert_width * (some >= 0).to(tl.int32)
    c = tl.arange(0, C)
    columns = c[None, None, :]
    w_ptrs = w_ptr + e[:, None, None] * width * expert_width + row[None, :, None] * expert_width + columns
    a_ptrs = a_ptr + (t * top_k + k[:, None]) * expert_width + c[None, :]
    acc = tl.zeros([PICKS, N, C], tl.float32)
    for start in tl.range(0, end, C, num_stages=STAGES):
        if ALL:
            w = _load(w_ptrs + start, start + columns, expert_width, EVEN)
            a = _load(a_ptrs + start, start + c[None, :], expert_width, EVEN)
        else:
            w = tl.load(w_ptrs + start, mask=(k[:, None, None] < top_k) & (start + columns < expert_width), other=0.0)
            a = tl.load(a_ptrs + start, mask=(k[:, None] < top_k) & (start + c[None, :] < expert_width), other=0.0)
        acc += w.to(tl.float32) * a.to(tl.float32)[:, None, :]
    y = tl.sum(acc, axis=2)
    if BIAS:
        bias_ptrs = bias_ptr + e[:, None] * width + row[None, :]
        bias = tl.load(bias_ptrs, mask=kept[:, None], other=0.0).to(tl.float32)
        y += bias * tl.load(scale_ptr + t * top_k + k, mask=kept, other=0.0)[:, None]
    y = tl.where(kept[:, None], y, 0.0)  # its activation was not written
    y_n = tl.zeros([N], tl.float32)
    for i in tl.static_range(PICKS):  # in the order of k; a reduction over the tile would be a tree
        y_n += tl.sum(tl.where(k[:, None] == i, y, 0.0), axis=0)
    tl.store(y_ptr + t * width + d, y_n.to(y_ptr.dtype.element_ty), mask=d < width)


@triton.jit(do_not_specialize=["num_picks", "num_tiles"])
def _group(
    ids_ptr, order_ptr, tiles_ptr, num_picks, num_tiles,
    BINS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program e writes where expert e's picks are and cuts them into tiles of at most ROWS.

    order[R]: picks sorted by expert, within an expert in their own order. tiles[3, num_tiles]: expert (-1: unused),
    first and last + 1 sorted row. Picks of no expert are in no tile. Every program counts all picks itself, which is
    cheaper than a second launch.
    """
    e = tl.program_id(0)
    num_experts = tl.num_programs(0)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, num_picks, CHUNK):
        # Picks of no expert, and what lies beyond the last pick, fall into the bin after the last expert.
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < num_picks, other=num_experts).to(tl.int32)
        counts += tl.histogram(ids, BINS)
    bins = tl.arange(0, BINS)
    count = tl.sum(tl.where(bins == e, counts, 0))
    first_row = tl.sum(tl.where(bins < e, counts, 0))
    first_tile = tl.sum(tl.where(bins < e, (counts + ROWS - 1) // ROWS, 0))

    seen = first_row
    for start in range(0, num_picks, CHUNK):
        ids = tl.load(ids_ptr + start + lane, mask=start + lane < num_picks, other=num_experts).to(tl.int32)
        mine = (ids == e).to(tl.int32)
        tl.store(order_ptr + seen + tl.cumsum(mine, 0) - 1, start + lane, mask=mine == 1)
        seen += tl.sum(mine)

    end_row = first_row + count
    end_tile = first_tile + (count + ROWS - 1) // ROWS
    last_to_write = num_tiles if e == num_experts - 1 else end_tile
    for start in range(first_tile, last_to_write, CHUNK):
        tile = start + lane
        row = first_row + (tile - first_tile) * ROWS
        inside = tile < last_to_write
        tl.store(tiles_ptr + tile, tl.where(tile < end_tile, e, -1), mask=inside)
        tl.store(tiles_ptr + num_tiles + tile, row, mask=inside)
        tl.store(tiles_ptr + 2 * num_tiles + tile, tl.minimum(row + ROWS, end_row), mask=inside)


@triton.jit(do_not_specialize=["top_k", "num_tiles"])
def _up_grouped(
    x_ptr, order_ptr, tiles_ptr, scale_ptr, w_ptr, bias_ptr, a_ptr, width, expert_width, top_k, num_tiles,
    ACT: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """a[r, f] = weight[r] * act(W1 x_t)[f] for N values of f and the sorted rows r of one tile. Grid (F/N, tiles)."""
    tile = tl.program_id(1)
    e = tl.load(tiles_ptr + tile).to(tl.int64)
    if e >= 0:
        r = tl.load(tiles_ptr + num_tiles + tile) + tl.arange(0, ROWS)
        used = r < tl.load(tiles_ptr + 2 * num_tiles + tile)
        # Columns beyond the tile compute token 0 and are not stored: no mask in the loop.
        pick = tl.load(order_ptr + r, mask=used, other=0)
        f = tl.program_id(0) * N + tl.arange(0, N)
        row = tl.minimum(f, expert_width - 1)
        c = tl.arange(0, C)
        halves = 2 if GATED else 1
        gate_ptrs = w_ptr + e * halves * expert_width * width + row[:, None] * width + c[None, :]
        up_ptrs = gate_ptrs + expert_width * width
        x_ptrs = x_ptr + (pick // top_k)[:, None] * width + c[None, :]
        gate = tl.zeros([N, ROWS], tl.float32)
        up = tl.zeros([N, ROWS], tl.float32)
        for start in range(0, width, C):
            columns = start + c[None, :]
            x = _load(x_ptrs + start, columns, width, EVEN).T
            gate = tl.dot(_load(gate_ptrs + start, columns, width, EVEN), x, gate, input_precision="ieee")
            if GATED:
                up = tl.dot(_load(up_ptrs + start, columns, width, EVEN), x, up, input_precision="ieee")
        if BIAS:
            bias_ptrs = bias_ptr + e * halves * expert_width + row
            gate += tl.load(bias_ptrs).to(tl.float32)[:, None]
            if GATED:
                up += tl.load(bias_ptrs + expert_width).to(tl.float32)[:, None]
        a = _activate(gate, up, ACT, GATED) * tl.load(scale_ptr + pick)[None, :]
        a_ptrs = a_ptr + r[None, :] * expert_width + f[:, None]
        tl.store(a_ptrs, a.to(a_ptr.dtype.element_ty), mask=(f < expert_width)[:, None] & used[None, :])


@triton.jit(do_not_specialize=["num_tiles"])
def _down_grouped(
    a_ptr, order_ptr, tiles_ptr, scale_ptr, w_ptr, bias_ptr, y_ptr, width, expert_width, num_tiles,
    BIAS: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y[pick, d] = (W2 a_r)[d] in fp32 for N values of d and the sorted rows r of one tile. Grid (D/N, tiles)."""
    tile = tl.program_id(1)
    e = tl.load(tiles_ptr + tile).to(tl.int64)
    if e >= 0:
        r = tl.load(tiles_ptr + num_tiles + tile) + tl.arange(0, ROWS)
        end = tl.load(tiles_ptr + 2 * num_tiles + tile)
        used = r < end
        pick = tl.load(order_ptr + r, mask=used, other=0)
        d = tl.program_id(0) * N + tl.arange(0, N)
        row = tl.minimum(d, width - 1)
        c = tl.arange(0, C)
        w_ptrs = w_ptr + e * width * expert_width + row[:, None] * expert_width + c[None, :]
        a_ptrs = a_ptr + tl.minimum(r, end - 1)[:, None] * expert_width + c[None, :]
        acc = tl.zeros([N, ROWS], tl.float32)
        for start in range(0, expert_width, C):
            columns = start + c[None, :]
            a = _load(a_ptrs + start, columns, expert_width, EVEN).T
            acc = tl.dot(_load(w_ptrs + start, columns, expert_width, EVEN), a, acc, input_precision="ieee")
        if BIAS:
            bias = tl.load(bias_ptr + e * width + row).to(tl.float32)
            acc += bias[:, None] * tl.load(scale_ptr + pick)[None, :]
        y_ptrs = y_ptr + pick[None, :] * width + d[:, None]
        tl.store(y_ptrs, acc, mask=(d < width)[:, None] & used[None, :])


@triton.jit
def _sum_picks(picks_ptr, ids_ptr, y_ptr, width, num_experts, K: tl.constexpr, N: tl.constexpr):
    """y[t, d] = sum over k of picks[t, k, d], added in the order of k, but for those of no expert. Grid (D/N, T)."""
    t = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * N + tl.arange(0, N)
    acc = tl.zeros([N], tl.float32)
    for k in tl.static_range(K):  # unrolled, so that no load waits for an addition
        kept = tl.load(ids_ptr + t * K + k) < num_experts
        acc += tl.load(picks_ptr + (t * K + k) * width + d, mask=(d < width) & kept, other=0.0)
    tl.store(y_ptr + t * width + d, acc.to(y_ptr.dtype.element_ty), mask=d < width)


def _columns(tile: DecodeTile, size: int, x: Tensor) -> tuple[int, bool]:
    """Columns a step for a summed dimension of `size`, half as many in fp32, and whether they divide it."""
    c = max(16, min(tile.c * 2 // x.element_size(), triton.next_power_of_2(size)))
    return c, size % c == 0


def _per_token(
    x_TD: Tensor, ids_TK: Tensor, scale_TK: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None,
    activation: str, tiles: DecodeTiles,
) -> Tensor:  # fmt: skip
    (T, K), (E, D, F) = ids_TK.shape, w2.shape
    picks = triton.next_power_of_2(K)
    a_RF, y_TD = x_TD.new_empty(T * K, F), torch.empty_like(x_TD)
    c, even = _columns(tiles.up, D, x_TD)
    _up_per_token[triton.cdiv(F, tiles.up.n), T * K](
        x_TD, ids_TK, scale_TK, w1, b1, a_RF, D, F, K, E,
        ACT=activation, GATED=w1.shape[1] == 2 * F, BIAS=b1 is not None,
        N=tiles.up.n, C=c, EVEN=even, STAGES=tiles.up.stages, num_warps=tiles.up.warps,
    )  # fmt: skip
    c, even = _columns(tiles.down, F, x_TD)
    _down_per_token[triton.cdiv(D, tiles.down.n), T](
        a_RF, ids_TK, scale_TK, w2, b2, y_TD, D, F, K, E,
        BIAS=b2 is not None, PICKS=picks, ALL=picks == K,
        N=tiles.down.n, C=c, EVEN=even, STAGES=tiles.down.stages, num_warps=tiles.down.warps,
    )  # fmt: skip
    return y_TD


def _grouped(
    x_TD: Tensor, ids_TK: Tensor, scale_TK: Tensor, w1: Tensor, w2: Tensor, b1: Tensor | None, b2: Tensor | None,
    activation: str, tiles: DecodeTiles,
) -> Tensor:  # fmt: skip
    (T, K), (E, D, F) = ids_TK.shape, w2.shape
    R, rows = T * K, tiles.rows
    # An expert's last tile may be short, and a tile has a row: no more tiles than this, whatever the routing.
    num_tiles = min(R, R // rows + min(R, E))
    order_R, table = (torch.empty(n, dtype=torch.int32, device=x_TD.device) for n in (R, 3 * num_tiles))
    # At least an element for each of the 128 threads: none counts the element of another.
    bins, chunk = triton.next_power_of_2(max(E + 1, 128)), min(1024, triton.next_power_of_2(max(R, 128)))
    _group[E,](ids_TK, order_R, table, R, num_tiles, BINS=bins, CHUNK=chunk, ROWS=rows, num_warps=4)
    a_RF, y_RD = x_TD.new_empty(R, F), x_TD.new_empty(R, D, dtype=torch.float32)
    c, even = _columns(tiles.up, D, x_TD)
    _up_grouped[triton.cdiv(F, tiles.up.n), num_tiles](
        x_TD, order_R, table, scale_TK, w1, b1, a_RF, D, F, K, num_tiles,
        ACT=activation, GATED=w1.shape[1] == 2 * F, BIAS=b1 is not None,
        ROWS=rows, N=tiles.up.n, C=c, EVEN=even, num_warps=tiles.up.warps, num_stages=tiles.up.stages,
    )  # fmt: skip
    c, even = _columns(tiles.down, F, x_TD)
    _down_grouped[triton.cdiv(D, tiles.down.n), num_tiles](
        a_RF, order_R, table, scale_TK, w2, b2, y_RD, D, F, num_tiles,
        BIAS=b2 is not None,
        ROWS=rows, N=tiles.down.n, C=c, EVEN=even, num_warps=tiles.down.warps, num_stages=tiles.down.stages,
    )  # fmt: skip
    y_TD = torch.empty_like(x_TD)
    _sum_picks[triton.cdiv(D, 512), T](y_RD, ids_TK, y_TD, D, E, K=K, N=512, num_warps=2)
    return y_TD


def decode_mlp(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    activation: str,
    *,
    tiles: DecodeTiles | None = None,
) -> Tensor:
    """`dmoe.ops.expert_mlp` for few tokens, without gradients. Arguments are not checked here.

    Args:
        x_TD: [T, D] bf16, fp16 or fp32; T may be 0. Right up to T * K = 65535, the most programs along
            one axis of a grid; meant for up to `DECODE_MAX_TOKENS`.
        topk_ids_TK: [T, K] int64 or int32, distinct within a row but for E, which is no expert.
        topk_weights_TK: [T, K] routing weights, applied once in fp32.
        gate_up_proj: [E, 2F, D] (gate rows, then up) or [E, F, D]. Copied if not contiguous, as all arguments.
        down_proj: [E, D, F].
        gate_up_bias, down_bias: [E, 2F] or [E, F], and [E, D], or None.
        activation: a name of `dmoe.ops.activations.ACTIVATIONS`.
        tiles: overrides the table, for measurements. Per-token tiles need K <= 16.

    Returns:
        [T, D] in the dtype of `x_TD`, detached. Every sum is in fp32 and of a fixed order, over picks that of k, so
        equal inputs give equal bits. Between numbers of tokens tiles may differ, and with them the last bits.
    """
    x, ids, scale, w1, w2 = (
        t.detach().contiguous() for t in (x_TD, topk_ids_TK, topk_weights_TK.float(), gate_up_proj, down_proj)
    )
    b1, b2 = (None if b is None else b.detach().contiguous() for b in (gate_up_bias, down_bias))
    if ids.numel() == 0:
        return torch.zeros_like(x)
    tiles = tiles or choose_decode_tiles(ids.shape[0], ids.shape[1], w2.shape[0])
    run = _grouped if tiles.rows else _per_token
    return run(x, ids, scale, w1, w2, b1, b2, activation, tiles)
