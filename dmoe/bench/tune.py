"""Find the fastest tile of each kernel for a layer on this GPU, and check that what it computes is right.

Every candidate is compiled in a pool of processes first, into Triton's cache on disk, then compared with torch's own
grouped products and timed. Legend: T tokens, D width, F expert width, E experts, K picks, R = T*K rows.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.bench.inputs import Shape, expert_weights
from dmoe.config import require
from dmoe.errors import RunError
from dmoe.ops.activations import activate, activate_backward
from dmoe.ops.kernels.launch import Tile
from dmoe.ops.kernels.products import rows_times_weights, weight_gradient
from dmoe.ops.kernels.tiles import row_tiles
from dmoe.ops.kernels.tuned import KINDS
from dmoe.ops.kernels.up import up_projection
from dmoe.ops.permute import sort_by_expert
from dmoe.ops.platform import is_hopper
from dmoe.ops.triton_experts import down_backward_here

MAX_ERROR = 1e-2
_MAX_WORKERS = 16  # each holds a few experts on the GPU


@dataclass(frozen=True)
class Problem:
    """The tensors of one layer, in bf16, routed uniformly at random."""

    shape: Shape
    x_TD: Tensor
    x_RD: Tensor
    h_RH: Tensor
    a_RF: Tensor
    gate_up: Tensor
    down: Tensor
    order_R: Tensor
    scale_R: Tensor
    offsets_E: Tensor


@dataclass(frozen=True)
class Result:
    """One tile of one kernel."""

    tile: Tile
    seconds: float
    limit: float
    """Seconds of the same product alone, as torch.bmm with equally many rows an expert."""
    error: float
    """Norm of the difference to torch's grouped products over their norm."""


def make_problem(shape: Shape, device: torch.device) -> Problem:
    torch.manual_seed(0)
    T, width, E, K = shape.tokens, shape.intermediate_size, shape.num_experts, shape.top_k

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=torch.bfloat16)

    weights, ids = torch.randn(T, E, device=device).softmax(-1).topk(K)
    order, _, offsets = sort_by_expert(ids, E)
    x = normal(T, shape.hidden_size)
    gate_up, down = (w.detach() for w in expert_weights(shape, torch.bfloat16, device))
    return Problem(
        shape, x, x[order // K], normal(T * K, 2 * width), normal(T * K, width), gate_up, down,
        order.int(), weights.flatten()[order], offsets,
    )  # fmt: skip


def launcher(p: Problem, kind: str, tile: Tile) -> Callable[[], tuple[Tensor, ...]]:
    """A call of one kernel."""
    tiles = row_tiles(p.offsets_E, p.order_R.numel(), tile.block_m)
    width, top_k = p.shape.intermediate_size, p.shape.top_k
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "up": lambda: up_projection(
            p.x_TD, p.order_R, top_k, p.scale_R, p.gate_up, None, tiles, width, "silu", True, tile
        ),
        "down": lambda: (rows_times_weights(p.a_RF, p.down, tiles, True, tile),),
        "up_backward": lambda: (rows_times_weights(p.h_RH, p.gate_up, tiles, False, tile),),
        "down_backward": lambda: down_backward_here(p.x_RD, p.scale_R, p.down, p.h_RH, tiles, "silu", tile),
        "gate_up_gradient": lambda: (weight_gradient(p.h_RH, p.x_RD, p.offsets_E, tile),),
        "down_gradient": lambda: (weight_gradient(p.x_RD, p.a_RF, p.offsets_E, tile),),
    }
    return calls[kind]


def reference(p: Problem, kind: str) -> tuple[Tensor, ...]:
    """The same with torch's grouped products."""
    offs, scale = p.offsets_E, p.scale_R[:, None]
    if kind == "up":
        h = F.grouped_mm(p.x_RD, p.gate_up.transpose(1, 2), offs=offs)
        return h, (activate(h, "silu", gated=True) * scale).to(h.dtype)
    if kind == "down":
        return (F.grouped_mm(p.a_RF, p.down.transpose(1, 2), offs=offs),)
    if kind == "up_backward":
        return (F.grouped_mm(p.h_RH, p.gate_up, offs=offs),)
    if kind == "down_backward":
        g = F.grouped_mm(p.x_RD, p.down, offs=offs).float()
        dh = torch.empty_like(p.h_RH)
        a = activate_backward(g * scale, p.h_RH, "silu", gated=True, out=dh)
        return dh, (a * scale).to(dh.dtype), (g * a).sum(1)
    left, right = (p.h_RH, p.x_RD) if kind == "gate_up_gradient" else (p.x_RD, p.a_RF)
    return (F.grouped_mm(left.t(), right, offs=offs),)


def limit(p: Problem, kind: str) -> Callable[[], object]:
    """The product alone, as a batched product with equally many rows an expert."""
    E = p.shape.num_experts
    rows = p.order_R.numel() // E
    x, h, a = (t[: rows * E].view(E, rows, -1) for t in (p.x_RD, p.h_RH, p.a_RF))
    left, right = {
        "up": (x, p.gate_up.transpose(1, 2)),
        "down": (a, p.down.transpose(1, 2)),
        "up_backward": (h, p.gate_up),
        "down_backward": (x, p.down),
        "gate_up_gradient": (h.transpose(1, 2), x),
        "down_gradient": (x.transpose(1, 2), a),
    }[kind]
    out = torch.empty(E, left.shape[1], right.shape[2], device=left.device, dtype=left.dtype)
    return lambda: torch.bmm(left, right, out=out)


def candidates(kind: str, hopper: bool) -> Iterator[Tile]:
    """Tiles worth trying. On a Hopper GPU smaller ones read their operands too often for the L2 cache."""
    splits = (4,) if kind == "down_backward" else (1, 2) if kind.endswith("gradient") else (1, 2, 4)
    orders = list(itertools.product((True, False), (4, 8, 16)))
    widths = (256,) if hopper else (64, 128)
    pipelines = ((64, 3), (64, 4)) if hopper else ((32, 3), (32, 4), (64, 2), (64, 3))
    for split, (flatten, group_m), width, (block_k, stages) in itertools.product(splits, orders, widths, pipelines):
        block_n = width // 2 if kind == "up" else width  # gate and up beside each other
        if hopper or not flatten:
            warps = 8 if width > 64 else 4
            yield Tile(128, block_n, block_k, group_m, split, warps, stages, flatten)


def _compile(shape: Shape, kind: str, tile: Tile) -> None:
    """Few rows and experts: they are no part of what is compiled."""
    small = replace(shape, tokens=64, num_experts=max(2, shape.top_k))
    launcher(make_problem(small, torch.device("cuda")), kind, tile)()
    torch.cuda.synchronize()


def compile_all(shape: Shape, kinds: tuple[str, ...] = KINDS) -> dict[tuple[str, Tile], str]:
    """Compile every candidate; what failed, and why."""
    failed: dict[tuple[str, Tile], str] = {}
    hopper = is_hopper(torch.device("cuda"))
    jobs = [(kind, tile) for kind in kinds for tile in candidates(kind, hopper)]
    workers = max(1, min(_MAX_WORKERS, len(jobs), (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, shape, kind, tile): (kind, tile) for kind, tile in jobs}
        for future in as_completed(futures):
            error = future.exception()
            if error is not None:
                failed[futures[future]] = f"{type(error).__name__}: {str(error)[-200:]}"
    return failed


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm, in blocks that fit beside the tensors."""
    difference = norm = 0.0
    for a, b in zip(*(t.reshape(-1, t.shape[-1]).split(2**13) for t in (got, want))):
        difference += float((a.float() - b.float()).square().sum())
        norm += float(b.float().square().sum())
    return (difference / max(norm, 1e-30)) ** 0.5


def milliseconds(run: Callable[[], object], rounds: int = 8) -> float:
    """Median time of `run` on the GPU, after two calls that do not count."""
    for _ in range(2):
        run()
    times = []
    for _ in range(rounds):
        torch.cuda._sleep(2_000_000)  # about a millisecond, in which the launches run ahead of the GPU
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def tune(shape: Shape, device: torch.device, kinds: tuple[str, ...] = KINDS) -> dict[str, list[Result]]:
    """Results of each kernel, fastest first; tiles that do not compile or are wrong are left out.

    Raises:
        ConfigError: a width is no multiple of 8, which the layer would pad.
        RunError: a kernel has no tile that works; says why.
    """
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(shape, name)
        require(width % 8 == 0, f"--shape {shape.name}: {name}", width, "a multiple of 8")
    failed = compile_all(shape, kinds)
    problem = make_problem(shape, device)
    results: dict[str, list[Result]] = {}
    for kind in kinds:
        want = reference(problem, kind)
        bound = milliseconds(limit(problem, kind))
        found = []
        for tile in candidates(kind, is_hopper(device)):
            if (kind, tile) in failed:
                continue
            run = launcher(problem, kind, tile)
            error = max(relative_error(a, b) for a, b in zip(run(), want))
            if error <= MAX_ERROR:
                found.append(Result(tile, milliseconds(run) / 1e3, bound / 1e3, error))
        if not found:
            reasons = sorted({reason for (other, _), reason in failed.items() if other == kind})
            raise RunError(f"bench tune: no tile of {kind} works here: {'; '.join(reasons) or 'all results are wrong'}")
        results[kind] = sorted(found, key=lambda result: result.seconds)
        del want
    return results
