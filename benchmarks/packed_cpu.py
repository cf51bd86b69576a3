"""Time the experts on a CPU without gradients, with packed weights and with plain ones.

    python benchmarks/packed_cpu.py [--shapes olmoe ...] [--tokens 1 8 64 512] [--dtype fp32 bf16] [--threads N]

Each round has new tokens and a new routing and runs every way once, in random order; figures are medians over rounds,
and ratios to the torch backend. Ways: "torch" (`expert_mlp`), "packed" (`expert_mlp_packed`), "onednn" (the same code
and the same operator with plain weights, which needs no second layout), "loop" and "grouped_mm" (as their users write
them), for fp32 "mkl" (MKL's packed weights). Results are compared before anything is timed.

Found (torch 2.13, two cores of an AMD Zen 4 with AVX-512 and bf16, a quiet machine, OMP_WAIT_POLICY=PASSIVE; time as a
share of the torch backend's at 1 / 8 / 64 / 512 tokens):

                                      packed                       onednn
    olmoe, one thread      bf16       0.62 / 0.70 / 0.66 / 0.88    0.97 / 1.05 / 1.08 / 1.00
                           fp32       1.06 / 0.83 / 0.55 / 0.81    0.81 / 0.74 / 0.83 / 0.90
    olmoe, two threads     bf16       0.79 / 0.85 / 0.78           0.98 / 1.04 / 1.07
                           fp32       0.78 / 0.55 / 0.44           0.69 / 0.54 / 0.58
    coarse, one thread     bf16       0.64 / 0.64 / 0.82 / 0.95    0.91 / 1.04 / 1.01 / 0.99
                           fp32       1.13 / 0.38 / 0.60 / 0.81    0.83 / 0.54 / 0.74 / 0.84
    medium, two threads    bf16       0.74 / 0.88 / 1.19           0.79 / 1.23 / 1.43
                           fp32       0.90 / 0.58 / 0.63           0.77 / 0.67 / 0.79

So packed weights pay for large experts: in bf16 at every number of tokens, in fp32 but for one row an expert in one
thread, where plain weights are read faster. For smaller experts in half precision the torch backend's batched product
can be better ("medium", and more so "small" and "tiny"). MKL's packed weights gain nothing from 8 tokens on (0.99 to
1.09). oneDNN with plain fp32 weights beats the torch backend (MKL) as well, without a second layout.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dmoe.bench.alternatives import grouped_mm, loop_over_experts
from dmoe.bench.inputs import LAYERS, Shape, expert_weights, make_inputs
from dmoe.bench.measure import Clock
from dmoe.ops import expert_mlp, packed
from dmoe.ops.packed import PackedWeights, expert_mlp_packed

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# D, F, E, K
SHAPES = {
    "tiny": (128, 192, 8, 2),
    "small": (512, 256, 16, 4),
    "medium": (1024, 512, 16, 4),
    "coarse": (2048, 4096, 4, 2),
    "olmoe": LAYERS["olmoe-1b-7b"],
}
Way = Callable[[Tensor, Tensor, Tensor], Tensor]


class _Plain(PackedWeights):
    """Plain weights in the place of packed ones."""

    def __init__(self, weights_ENM: Tensor) -> None:
        self.shape, self.dtype = weights_ENM.shape, weights_ENM.dtype
        self.matrices = list(weights_ENM.unbind(0))


class _MKL:
    """The loop over experts with weights that MKL has packed for a number of rows; fp32 alone."""

    def __init__(self, gate_up: Tensor, down: Tensor, rows: int) -> None:
        pack = torch.ops.mkl._mkl_reorder_linear_weight
        self._rows = rows
        self._weights = [(u, pack(u, rows), d, pack(d, rows)) for u, d in zip(gate_up, down)]

    def __call__(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        linear = torch.ops.mkl._mkl_linear
        y_TD = torch.zeros_like(x_TD)
        for expert, (up, up_packed, down, down_packed) in enumerate(self._weights):
            tokens, picks = torch.where(ids_TK == expert)
            if len(tokens):
                gate, value = linear(x_TD[tokens], up_packed, up, None, self._rows).chunk(2, dim=1)
                product = linear(torch.nn.functional.silu(gate) * value, down_packed, down, None, self._rows)
                y_TD.index_add_(0, tokens, product * weights_TK[tokens, picks].unsqueeze(1))
        return y_TD


def make_ways(gate_up: Tensor, down: Tensor, rows: int, skip: Sequence[str] = ()) -> dict[str, Way]:
    """Every way of these weights that works here."""
    ways: dict[str, Way] = {
        "torch": lambda x, ids, w: expert_mlp(x, ids, w, gate_up, down, backend="torch"),
        "loop": lambda x, ids, w: loop_over_experts(x, ids, w, gate_up, down),
        "grouped_mm": lambda x, ids, w: grouped_mm(x, ids, w, gate_up, down),
    }
    if packed.why_not_packed(gate_up) is None:
        for name, kind in (("packed", PackedWeights), ("onednn", _Plain)):
            up, out = kind(gate_up), kind(down)
            ways[name] = partial(_run, up, out)
    if "mkl" not in skip and gate_up.dtype == torch.float32 and torch.backends.mkl.is_available():
        ways["mkl"] = _MKL(gate_up, down, rows)
    return {name: way for name, way in ways.items() if name not in skip}


def _run(up: PackedWeights, down: PackedWeights, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return expert_mlp_packed(x, ids, weights, up, down)


@torch.no_grad()
def time_ways(shape: Shape, dtype: torch.dtype, rounds: int, skip: Sequence[str] = ()) -> dict[str, float]:
    """Median seconds of each way."""
    gate_up, down = (weights.detach() for weights in expert_weights(shape, dtype, CPU))
    ways = make_ways(gate_up, down, max(1, shape.tokens * shape.top_k // shape.num_experts), skip)
    x, ids, weights, _ = make_inputs(shape, "uniform", dtype, CPU)
    results = {name: way(x, ids, weights).float() for name, way in ways.items()}
    for name, result in results.items():
        error = ((result - results["torch"]).norm() / results["torch"].norm()).item()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4), f"{name}: relative error {error}"
    clock, seconds = Clock(CPU), {name: [] for name in ways}  # type: tuple[Clock, dict[str, list[float]]]
    for number in range(rounds + 2):
        inputs = make_inputs(shape, "uniform", dtype, CPU)[:3]
        for name in random.sample(list(ways), len(ways)):
            taken = clock.seconds(partial(ways[name], *inputs))
            if number >= 2:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a shape, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["small", "medium", "coarse", "olmoe"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--skip", nargs="+", default=[], help="ways to leave out")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = []
    for dtype in options.dtype:
        for name in options.shapes:
            for tokens in options.tokens:
                shape = Shape(name, *SHAPES[name], tokens)
                times = time_ways(shape, DTYPES[dtype], options.rounds, options.skip)
                results.append({"shape": vars(shape), "dtype": dtype, "seconds": times})
                columns = (f"{way} {1e3 * t:.2f} ms ({t / times['torch']:.2f})" for way, t in times.items())
                print(f"{name} {dtype} T={tokens}: " + ", ".join(columns), flush=True)
    if options.json:
        content = {"threads": options.threads, "torch": torch.__version__, "rounds": options.rounds, "results": results}
        options.json.write_text(json.dumps(content, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
