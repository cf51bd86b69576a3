"""Time the experts at few tokens: `decode_mlp` against the torch backend and the time to read the chosen weights.

    python benchmarks/decode.py [--shapes qwen3 olmoe mixtral] [--tokens 1 8 64 256] [--sweep]

Needs a CUDA device. Every time is that of one call within a CUDA graph of several calls, each with a routing of its
own, so that the weights of one call are not in the cache for the next. The bound is the bytes of the experts that were
chosen, at the bandwidth of a large copy on the same card. `--sweep` first compiles and times other tiles, the up and
the down projection each with the other at its default, and prints the best of each as a line for the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from dmoe.ops import expert_mlp
from dmoe.ops.kernels.decode import GROUPED, PER_TOKEN, DecodeTile, DecodeTiles, choose_decode_tiles, decode_mlp


@dataclass(frozen=True)
class Shape:
    """One layer of a model."""

    width: int
    expert_width: int
    num_experts: int
    top_k: int


SHAPES = {
    "qwen3": Shape(2048, 768, 128, 8),
    "olmoe": Shape(2048, 1024, 64, 8),
    "mixtral": Shape(4096, 14336, 8, 2),
}
Weights = tuple[Tensor, Tensor]
Tokens = tuple[Tensor, Tensor, Tensor]


def make_weights(shape: Shape, experts: int) -> Weights:
    """gate_up and down in bf16."""
    D, F = shape.width, shape.expert_width
    gate_up = torch.randn(experts, 2 * F, D, device="cuda", dtype=torch.bfloat16) * D**-0.5
    return gate_up, torch.randn(experts, D, F, device="cuda", dtype=torch.bfloat16) * F**-0.5


def make_tokens(shape: Shape, num_tokens: int, calls: int) -> list[Tokens]:
    """x, ids and weights for each call; uniform routing."""
    torch.manual_seed(0)
    made = []
    for _ in range(calls):
        x = torch.randn(num_tokens, shape.width, device="cuda", dtype=torch.bfloat16)
        logits = torch.randn(num_tokens, shape.num_experts, device="cuda")
        weights, ids = logits.softmax(-1).topk(shape.top_k)
        made.append((x, ids, weights))
    return made


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda").zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_seconds([lambda: target.copy_(source)])


def graph_seconds(calls: list[Callable[[], object]], rounds: int = 15) -> float:
    """Median over replays of the mean seconds of a call, in one CUDA graph of all calls."""
    calls[0]()  # compile
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times[2:])


def ours(tokens: Tokens, weights: Weights, tiles: DecodeTiles | None) -> Tensor:
    """One call of `decode_mlp`."""
    (x, ids, scale), (gate_up, down) = tokens, weights
    return decode_mlp(x, ids, scale, gate_up, down, None, None, "silu", tiles=tiles)


@torch.no_grad()
def theirs(tokens: Tokens, weights: Weights) -> Tensor:
    """One call of the backend "torch", two grouped_mm."""
    (x, ids, scale), (gate_up, down) = tokens, weights
    return expert_mlp(x, ids, scale, gate_up, down, backend="torch")


def time_decode(tokens: list[Tokens], weights: Weights, tiles: DecodeTiles | None) -> float:
    """Seconds of `decode_mlp`."""
    return graph_seconds([partial(ours, t, weights, tiles) for t in tokens])


def bound(shape: Shape, tokens: list[Tokens], bandwidth: float) -> float:
    """Seconds to read every chosen expert once."""
    experts = statistics.mean(len(ids.unique()) for _, ids, _ in tokens)
    return experts * 3 * shape.width * shape.expert_width * 2 / bandwidth


def check(tokens: Tokens, weights: Weights, tiles: DecodeTiles | None) -> None:
    """A fast kernel that is wrong is no result."""
    want, got = theirs(tokens, weights).float(), ours(tokens, weights, tiles).float()
    error = ((got - want).norm() / want.norm()).item()
    assert error < 2e-2, f"{tiles}: relative error {error}"


def per_token_candidates() -> Iterator[DecodeTiles]:
    """The default with another up or down tile."""
    for n in (1, 2, 4, 8):
        for c in (256, 512, 1024):
            for warps in (2, 4, 8):
                for stages in (1, 2, 4):
                    if warps * 256 <= n * c <= warps * 1024:
                        yield replace(PER_TOKEN, up=DecodeTile(n, c, warps, stages))
                    if warps * 32 <= n * c <= warps * 256:  # times the picks
                        yield replace(PER_TOKEN, down=DecodeTile(n, c, warps, stages))


def _fits(rows: int, tile: DecodeTile, matrices: int) -> bool:
    """Two programs a multiprocessor, and one stage of loads at least in flight beside the one in use."""
    stage = (matrices * tile.n + rows) * tile.c * 2
    return tile.stages * stage <= 112 * 1024


def grouped_candidates(rows: int) -> Iterator[DecodeTiles]:
    """The default of `rows` with another up or down tile."""
    default = GROUPED[rows]
    for n in (16, 32, 64, 128):
        for c in (64, 128, 256):
            for warps in (4, 8) if n >= 64 else (2, 4):
                for stages in (2, 3, 4, 6):
                    tile = DecodeTile(n, c, warps, stages)
                    if _fits(rows, tile, 2):
                        yield replace(default, up=tile)
                    if _fits(rows, tile, 1):
                        yield replace(default, down=tile)


def candidates(num_tokens: int, shape: Shape) -> list[DecodeTiles]:
    """Tiles worth a try: those of the table's choice, and the other numbers of rows with their defaults."""
    chosen = choose_decode_tiles(num_tokens, shape.top_k, shape.num_experts)
    found = list(per_token_candidates()) if chosen.rows == 0 else list(grouped_candidates(chosen.rows))
    others = [*GROUPED.values()] + ([PER_TOKEN] if num_tokens <= 8 and shape.top_k <= 16 else [])
    return list(dict.fromkeys([chosen, *others, *found]))


def _compile(job: tuple[Shape, list[DecodeTiles]]) -> list[str]:
    """In a process of its own: fill the compile cache on disk. Few experts suffice, their number is not compiled in."""
    shape, tiles = job
    experts = shape.top_k
    weights = make_weights(shape, experts)
    tokens = make_tokens(replace(shape, num_experts=experts), 2, 1)[0]
    failures = []
    for t in tiles:
        try:
            ours(tokens, weights, t)
        except Exception as error:  # too much shared memory, say: not a candidate
            failures.append(f"{t}: {type(error).__name__}")
    torch.cuda.synchronize()
    return failures


def sweep(shape: Shape, num_tokens: int, weights: Weights, tokens: list[Tokens]) -> None:
    """Print the fastest tiles."""
    tried = candidates(num_tokens, shape)
    workers = min(16, os.cpu_count() or 1)
    # One process needs one copy of a few experts: those of a large model would not fit sixteen times.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        jobs = [(shape, tried[i::workers]) for i in range(workers)]
        failures = sum(len(failed) for failed in pool.map(_compile, jobs, chunksize=1))
    print(f"  {len(tried)} candidates, {failures} do not compile or launch")
    times: dict[DecodeTiles, float] = {}
    for t in tried:
        try:
            check(tokens[0], weights, t)
            times[t] = time_decode(tokens, weights, t)
        except Exception as error:
            print(f"  {t}: {type(error).__name__} {str(error)[:80]}")
    chosen = tried[0]
    kinds = {
        "way": [t for t in times if t in (PER_TOKEN, *GROUPED.values())],
        "up": [t for t in times if (t.rows, t.down) == (chosen.rows, chosen.down)],
        "down": [t for t in times if (t.rows, t.up) == (chosen.rows, chosen.up)],
    }
    for kind, tiles in kinds.items():
        for t in sorted(tiles, key=times.__getitem__)[:4]:
            print(f"  {kind:5}{times[t] * 1e6:9.1f} us  {t}")
    best = replace(chosen, **{k: getattr(min(kinds[k], key=times.__getitem__), k) for k in ("up", "down")})
    print(f"  both {time_decode(tokens, weights, best) * 1e6:9.1f} us  {best}")


def main() -> None:
    """Parse the command line, print one line a shape and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--sweep", action="store_true", help="time other tiles too")
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}; copy {bandwidth * 1e-12:.2f} TB/s; us a call")
    print(f"{'shape':9}{'tokens':>7}{'bound':>9}{'decode':>9}{'torch':>9}{'of bound':>10}  rows a tile", flush=True)
    for name in args.shapes:
        shape = SHAPES[name]
        weights = make_weights(shape, shape.num_experts)
        for num_tokens in args.tokens:
            tokens = make_tokens(shape, num_tokens, calls=16 if num_tokens < 64 else 4)
            check(tokens[0], weights, None)
            least, own = bound(shape, tokens, bandwidth), time_decode(tokens, weights, None)
            other = graph_seconds([partial(theirs, t, weights) for t in tokens])
            rows = choose_decode_tiles(num_tokens, shape.top_k, shape.num_experts).rows
            print(
                f"{name:9}{num_tokens:7}{least * 1e6:9.1f}{own * 1e6:9.1f}{other * 1e6:9.1f}{least / own:10.0%}"
                f"  {rows or 'per token'}",
                flush=True,
            )
            if args.sweep:
                sweep(shape, num_tokens, weights, tokens)


if __name__ == "__main__":
    main()
