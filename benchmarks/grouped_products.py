"""Grouped products against balanced batched ones, on the 18 problems of MegaBlocks (arXiv:2211.15841, figure 9).

    python benchmarks/grouped_products.py [--storage ours|megablocks] [--rounds N] [--json FILE]

Three models (MoE-XS, Small, Medium: width 512, 768, 1024; experts of 4 times the width; 64 experts, top-1; 64, 32 and
8 sequences of 1024 tokens), and of each the six products of a plain two-layer expert: forward, gradient of the input
and gradient of the weight, of both layers. Routing is uniform: every expert has as many rows, which is what `torch.bmm`
can do at all. Rows are sorted and the tables that kernels walk are made outside the timing, as in the paper. bf16 here,
fp16 there. The paper's block-sparse products reach 98.6 % of cuBLAS's batched ones on an A100 (91 to 104 %).

With "--storage ours" both weights are stored [E, out, in], as this package does; with "megablocks" the second one is
[E, in, out], as there, where the products of the second layer repeat those of the first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.bench.measure import Clock, attempt
from dmoe.cli.arguments import Parser
from dmoe.cli.bench import machine
from dmoe.errors import ConfigError
from dmoe.train.device import resolve_device

MODELS = {"XS": (64 * 1024, 512), "Small": (32 * 1024, 768), "Medium": (8 * 1024, 1024)}
PRODUCTS = ("forward", "grad_x", "grad_w")
_SETS = 2
_WRONG = 0.01


@dataclass(frozen=True)
class Problem:
    """One product of one layer of E experts with R rows in all."""

    model: str
    layer: int
    product: str
    rows: int
    num_experts: int
    width_in: int
    width_out: int
    out_first: bool
    """The weight is stored [E, out, in], else [E, in, out]."""

    @property
    def transpose_weights(self) -> bool:
        """The rows are multiplied with the transpose of what is stored."""
        return (self.product == "forward") == self.out_first

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        sizes = (self.width_out, self.width_in) if self.out_first else (self.width_in, self.width_out)
        return (self.num_experts, *sizes)

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.width_in * self.width_out

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, weight), or for grad_w the two matrices of rows, in the order of the result's dimensions."""
        normal = partial(torch.randn, dtype=torch.bfloat16, device=device)
        if self.product == "grad_w":
            _, left, right = self.weight_shape
            return normal(self.rows, left), normal(self.rows, right)
        width = self.width_in if self.product == "forward" else self.width_out
        return normal(self.rows, width), normal(*self.weight_shape).mul_(width**-0.5)


def problems(
    models: dict[str, tuple[int, int]] = MODELS, num_experts: int = 64, storage: str = "ours"
) -> list[Problem]:
    """The 18 problems: three models, two layers, three products."""
    return [
        Problem(
            model, layer, product, rows, num_experts, width if layer == 0 else 4 * width,
            4 * width if layer == 0 else width, layer == 0 or storage == "ours",
        )
        for model, (rows, width) in models.items()
        for layer in range(2)
        for product in PRODUCTS
    ]  # fmt: skip


Product = Callable[[Tensor, Tensor], Tensor]


def bmm(problem: Problem, _offsets_E: Tensor) -> Product:
    """The limit: a batched product of equal experts, into a given output."""
    output: list[Tensor] = []

    def run(left: Tensor, right: Tensor) -> Tensor:
        batches = left.view(problem.num_experts, -1, left.shape[1])
        if problem.product == "grad_w":
            factors = batches.transpose(1, 2), right.view(problem.num_experts, -1, right.shape[1])
        else:
            factors = batches, right.transpose(1, 2) if problem.transpose_weights else right
        if not output:
            output.append(torch.bmm(*factors))
        return torch.bmm(*factors, out=output[0])

    return run


def grouped_mm(problem: Problem, offsets_E: Tensor) -> Product:
    """`torch.nn.functional.grouped_mm`."""
    if problem.product == "grad_w":
        return lambda left, right: F.grouped_mm(left.T, right, offs=offsets_E)
    if problem.transpose_weights:
        return lambda rows, weight: F.grouped_mm(rows, weight.transpose(1, 2), offs=offsets_E)
    return lambda rows, weight: F.grouped_mm(rows, weight, offs=offsets_E)


def ours(problem: Problem, offsets_E: Tensor) -> Product:
    """This package's Triton products, with the tiles that a layer of these widths would take."""
    from dmoe.ops.kernels.products import rows_times_weights, weight_gradient
    from dmoe.ops.kernels.tiles import row_tiles
    from dmoe.ops.kernels.tuned import choose_tiles

    hidden_size, expert_width = sorted((problem.width_in, problem.width_out))
    like = torch.empty(0, dtype=torch.bfloat16, device=offsets_E.device)
    chosen = choose_tiles(like, hidden_size, expert_width, problem.rows // problem.num_experts)
    if problem.product == "grad_w":
        gradient = chosen.gate_up_gradient if problem.layer == 0 else chosen.down_gradient
        return lambda left, right: weight_gradient(left, right, offsets_E, gradient)
    tile = chosen.down if problem.transpose_weights else chosen.up_backward
    tiles = row_tiles(offsets_E, problem.rows, tile.block_m)
    return lambda rows, weight: rows_times_weights(rows, weight, tiles, problem.transpose_weights, tile)


IMPLEMENTATIONS = {"dmoe-triton": ours, "grouped_mm": grouped_mm, "bmm": bmm}


def _flat(result: Tensor, problem: Problem) -> Tensor:
    return result if problem.product == "grad_w" else result.reshape(problem.rows, -1)


def time_problem(
    problem: Problem, names: Sequence[str], device: torch.device, *, rounds: int, clock: Clock
) -> dict[str, dict[str, Any]]:
    """Median seconds and relative difference from bmm's result, or a problem in words, for each implementation.

    Interleaved in random order; the first round of every input set is not counted.
    """
    size = problem.rows // problem.num_experts
    offsets_E = torch.arange(1, problem.num_experts + 1, dtype=torch.int32, device=device) * size
    operands = [problem.operands(device) for _ in range(_SETS)]
    right = _flat(bmm(problem, offsets_E)(*operands[0]), problem).float()
    results: dict[str, dict[str, Any]] = {name: {} for name in names}
    runs: dict[str, Product] = {}

    def first_call(name: str) -> float:
        runs[name] = IMPLEMENTATIONS[name](problem, offsets_E)
        return float((_flat(runs[name](*operands[0]), problem).float() - right).norm() / right.norm())

    for name in names:
        difference, failure = attempt(partial(first_call, name))
        results[name] = {"problem": failure} if failure else {"difference": difference, "rounds": []}
    order = random.Random(0)
    for number in range(rounds + _SETS):
        for name in order.sample(list(names), len(names)):
            if "rounds" not in results[name]:
                continue
            taken, failure = attempt(lambda: clock.seconds(partial(runs[name], *operands[number % _SETS])))  # noqa: B023
            if failure:
                results[name] = {"problem": failure}
            elif number >= _SETS:
                results[name]["rounds"].append(taken)
    for result in results.values():
        if "rounds" in result:
            result["seconds"] = statistics.median(result["rounds"])
            result["tflops"] = problem.flops / result["seconds"] / 1e12
    return results


def _print_line(problem: Problem, results: dict[str, dict[str, Any]]) -> None:
    line = f"{problem.model:8}{problem.layer:>5}  {problem.product:9}"
    for name, result in results.items():
        if "problem" in result:
            line += f"{result['problem'][:20]:>22}"
            continue
        percent = result.get("percent_of_bmm")
        line += f"{1e3 * result['seconds']:>12.3f}" + (
            f"{'':10}" if name == "bmm" or percent is None else f"{percent:>8.1f} %"
        )
        line += " WRONG" if result["difference"] > _WRONG else ""
    print(line, flush=True)


def mean_percent(entries: list[dict[str, Any]], name: str) -> float | None:
    """The mean over problems of the percentage of bmm's speed; None if one is missing."""
    percents = [entry["results"][name].get("percent_of_bmm") for entry in entries]
    return statistics.mean(percents) if percents and None not in percents else None


def main(arguments: list[str]) -> int:
    """Print a line a problem and the means; 1 if a product is wrong."""
    parser = Parser(
        prog="grouped_products.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--storage", choices=["ours", "megablocks"], default="ours", help="how weights are stored (ours)"
    )
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    parser.add_argument("--rounds", type=int, default=20, help="rounds that the medians are over (20)")
    parser.add_argument("--quick", action="store_true", help="widths and rows of a CPU's size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        raise ConfigError(f"--rounds is {options.rounds}: must be greater than 0")
    device = resolve_device(options.device, "--device")
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    clock = Clock(device)
    names = [name for name in IMPLEMENTATIONS if name != "dmoe-triton" or device.type == "cuda"]
    models = {model: (rows // 512, width // 32) for model, (rows, width) in MODELS.items()} if options.quick else MODELS
    print(
        f"{machine(device)}\n{'model':8}{'layer':>5}  {'product':9}" + "".join(f"{n + ' ms':>12}{'':10}" for n in names)
    )
    entries: list[dict[str, Any]] = []
    for problem in problems(models, 8 if options.quick else 64, options.storage):
        results = time_problem(problem, names, device, rounds=options.rounds, clock=clock)
        limit = results["bmm"].get("seconds")
        for result in results.values():
            if limit and "seconds" in result:
                result["percent_of_bmm"] = 100 * limit / result["seconds"]
        entries.append({"problem": vars(problem), "flops": problem.flops, "results": results})
        _print_line(problem, results)
    means = {name: mean_percent(entries, name) for name in names if name != "bmm"}
    for name, mean in means.items():
        print(f"{name}: mean of {len(entries)} problems " + ("not known" if mean is None else f"{mean:.1f} % of bmm"))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": machine(device), "storage": options.storage, "mean_percent": means, "problems": entries}
        options.json.write_text(json.dumps(content, indent=1))
    wrong = any(r.get("difference", 0) > _WRONG for entry in entries for r in entry["results"].values())
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(str(error))
