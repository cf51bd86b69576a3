"""Where the time of one mixture-of-experts layer goes: a table of its GPU kernels, or of its operators on a CPU.

    python benchmarks/profile_layer.py [--shape NAME|D/F/E/K] [--tokens T] [--router] [--json FILE] ...

A step is a forward without gradients, or a forward and backward, of `expert_mlp` with SwiGLU experts in bf16, on the
same inputs each time; with --router also of a whole `MoE` layer over the same experts, whose own router chooses. Kernel
times come from torch.profiler. The time of a step is that of steps back to back without the profiler, with launches
ahead of the device, and "idle" what of it no kernel explains (operators of a CPU take longer under the profiler and can
add up to more). Groups: "products" with all that is fused into them, but for the one in whose epilogue the backward of
the activation is: "activation". "rows" are copied between the orders of tokens and experts, or added up. "routing" is
the router's, and for the `MoE` layer all that `expert_mlp` does not run: the router's product, the losses.

The host's times are those until a call returns, without waiting for the GPU: a forward with gradients, its backward.
For comparison three `torch.nn.functional.grouped_mm` (gate, up, down), and a layer written with it. A CPU is done then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from moe_layer import describe, parse_shapes  # which also sets how the allocator works
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from dmoe.bench.alternatives import grouped_mm
from dmoe.bench.contest import KINDS, Contestant
from dmoe.bench.inputs import LAYERS, ROUTINGS, Inputs, Shape, expert_weights, make_inputs
from dmoe.bench.measure import Clock, attempt
from dmoe.cli.arguments import Parser
from dmoe.config import MoEConfig, require
from dmoe.errors import ConfigError, RunError
from dmoe.moe import MoE
from dmoe.ops import BACKENDS, expert_mlp, sort_by_expert
from dmoe.train.device import resolve_device

# Our kernels by the names of their functions, which are what a profiler sees. `_kernel` is `_down_backward_kernel` for
# Hopper.
KERNELS = {
    "products": "_up_kernel _rows_kernel _weight_gradient_kernel "
    "_up_per_token _down_per_token _up_grouped _down_grouped",
    "activation": "_down_backward_kernel _kernel _activate_rows _activate_backward_rows",
    "routing": "_route_kernel _route_backward_kernel",
    "metadata": "_sort_in_one_block _count_blocks _add_up_blocks _place_rows _row_tiles_kernel _group "
    "_count_token_rows _place_token_rows",
    "rows": "_sum_picks _spread_rows _quantise_rows",
    "other": "_quantise_columns",
}  # fmt: skip
# How torch's kernels and operators begin, after `readable`; those that do not are "other".
PREFIXES = {
    "products": "cutlass cublas nvjet gem ampere_ sm80_ sm90_ sm100_ aten::_grouped_mm aten::bmm aten::mm aten::addmm",
    "activation": "aten::silu",
    "routing": "aten::topk aten::_softmax",
    "metadata": "at_cuda_detail::cub cub:: prepare_grouped_gemm aten::sort aten::scatter_ aten::cumsum",
    "rows": "vectorized_gather indexSelect index_elementwise EmbeddingBag aten::index aten::_embedding_bag",
}  # fmt: skip
BESIDE_PRODUCTS = ("routing", "metadata", "rows")
_WARM_UP = 3
_SHOWN = 20
_DEFAULTS = {"shape": "qwen3-30b-a3b", "tokens": 32768, "rounds": 10}
_QUICK = {"shape": "64/32/8/2", "tokens": 64, "rounds": 2}


def readable(name: str) -> str:
    """A kernel's name without the words that most of torch's have."""
    for noise in ("void ", "(anonymous namespace)::", "at::native::", "at::cuda::detail::"):
        name = name.replace(noise, "")
    return name


def group_of(name: str) -> str:
    for group, names in KERNELS.items():
        if name in names.split():
            return group
    return next((g for g, begins in PREFIXES.items() if readable(name).startswith(tuple(begins.split()))), "other")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def profile_steps(step: Callable[[], Any], steps: int, device: torch.device) -> list[dict[str, Any]]:
    """Name, calls and milliseconds a step of every kernel (on a CPU: operator, without those that it calls), the
    longest first."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        for _ in range(steps):
            step()
        _synchronize(device)  # else the last kernels end after the recording
    rows = []
    for event in profiler.key_averages():
        # Not the ranges that were given a name: the kernels in them are here themselves.
        if (event.device_type != DeviceType.CPU) == on_gpu and not getattr(event, "is_user_annotation", False):
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append({"name": event.key, "calls": event.count / steps, "ms": microseconds / steps / 1e3})
    if not sum(row["ms"] for row in rows):
        raise RunError(f"torch.profiler saw nothing run on {device}: it needs CUPTI, and no other profiler beside it")
    return sorted(rows, key=lambda row: -row["ms"])


def profile_phase(
    contestant: Contestant, inputs: Inputs, kind: str, steps: int, clock: Clock, known: Iterable[str] | None = None
) -> dict[str, Any]:
    """Kernels, groups, and the time of a step. Whatever is not in `known`, if that is given, is "routing"."""
    step, device = partial(getattr(contestant, kind), inputs), inputs.x_TD.device

    def run() -> None:
        for _ in range(steps):
            step()

    for _ in range(_WARM_UP):
        step()
    profile_steps(step, 1, device)  # the first recording of a process starts the profiler
    wall = 1e3 * statistics.median(clock.seconds(run) for _ in range(3)) / steps
    rows = profile_steps(step, steps, device)
    total, groups = sum(row["ms"] for row in rows), dict.fromkeys((*KERNELS,), 0.0)
    for row in rows:
        row["share"] = row["ms"] / total
        row["group"] = group_of(row["name"]) if known is None or row["name"] in known else "routing"
        groups[row["group"]] += row["ms"]
    return {
        "what": contestant.name, "kind": kind, "kernels": rows, "groups_ms": groups,
        "kernels_ms": total, "wall_ms": wall, "idle_ms": wall - total,
        "beside_products_share": sum(groups[group] for group in BESIDE_PRODUCTS) / total,
    }  # fmt: skip


def phase_table(phase: dict[str, Any], unit: str) -> str:
    """The longest kernels, the sum of the others, the groups, and what no kernel explains."""
    lines = [f"\n{phase['what']}, {phase['kind'].replace('_', ' and ')}"]
    lines.append(f"{unit:50}{'group':>12}{'calls':>8}{'ms':>10}{'share':>8}")
    rows, rest = phase["kernels"][:_SHOWN], phase["kernels"][_SHOWN:]
    if rest:
        sums: dict[str, Any] = {key: sum(row[key] for row in rest) for key in ("calls", "ms", "share")}
        rows = [*rows, {"name": f"({len(rest)} others)", "group": "", **sums}]
    for row in rows:
        name = readable(row["name"])
        name = name if len(name) < 50 else f"{name[:46]}..."
        lines.append(f"{name:50}{row['group']:>12}{row['calls']:>8.4g}{row['ms']:>10.4f}{100 * row['share']:>7.1f}%")
    total, wall, idle = (phase[key] for key in ("kernels_ms", "wall_ms", "idle_ms"))
    lines.append(f"sum {total:.4f} ms, a step {wall:.4f} ms, idle {idle:.4f} ms ({100 * idle / wall:.1f}%)")
    groups = [(group, ms) for group, ms in phase["groups_ms"].items() if ms]
    lines.append(", ".join(f"{group} {ms:.4f} ms ({100 * ms / total:.1f}%)" for group, ms in groups))
    share = f"{100 * phase['beside_products_share']:.1f}% of the {unit} time"
    return "\n".join([*lines, f"{', '.join(BESIDE_PRODUCTS)} together: {share}"])


def host_times(call: Callable[[], Any], leaves: Sequence[Tensor], grads: Any, repeats: int) -> dict[str, float]:
    """Median milliseconds until a forward, and its backward, are launched."""
    times: dict[str, list[float]] = {"forward_ms": [], "backward_ms": []}
    for _ in range(_WARM_UP + repeats):
        _synchronize(leaves[0].device)  # an empty queue: no launch waits for room in it
        start = time.perf_counter()
        outputs = call()
        middle = time.perf_counter()
        torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        times["backward_ms"].append(time.perf_counter() - middle)
        times["forward_ms"].append(middle - start)
    return {name: 1e3 * statistics.median(values[_WARM_UP:]) for name, values in times.items()}


def _host_of(contestant: Contestant, inputs: Inputs, repeats: int) -> dict[str, float]:
    leaves = [inputs.x_TD, inputs.weights_TK, *contestant.leaves]
    return host_times(lambda: contestant.call(*inputs[:3]), leaves, inputs.grad_TD, repeats)


def _host_of_products(inputs: Inputs, gate_up: Tensor, down: Tensor, repeats: int) -> dict[str, float]:
    """Three grouped_mm on rows in the order of the experts: gate, up, and down of what gate gave."""
    order_R, _, offsets_E = sort_by_expert(inputs.ids_TK, down.shape[0])
    x_RD = inputs.x_TD.detach()[order_R // inputs.ids_TK.shape[1]].requires_grad_()
    gate, up = (half.detach().contiguous().requires_grad_() for half in gate_up.chunk(2, dim=1))

    def call() -> tuple[Tensor, Tensor]:
        a_RF, b_RF = (F.grouped_mm(x_RD, weight.transpose(1, 2), offs=offsets_E) for weight in (gate, up))
        return F.grouped_mm(a_RF, down.transpose(1, 2), offs=offsets_E), b_RF

    return host_times(call, [x_RD, gate, up, down], [torch.randn_like(y) for y in call()], repeats)


def _layer(shape: Shape, gate_up: Tensor, down: Tensor, backend: Any) -> MoE:
    """A layer of these experts and a router of random weights."""
    config = MoEConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size, num_experts=shape.num_experts,
        top_k=shape.top_k, backend=backend,
    )  # fmt: skip
    layer = MoE(config, device="meta", dtype=gate_up.dtype)
    layer.router.weight = nn.Parameter(torch.randn_like(layer.router.weight, device=gate_up.device).mul_(0.02))
    layer.experts.gate_up_proj, layer.experts.down_proj = nn.Parameter(gate_up.detach()), nn.Parameter(down.detach())
    return layer


def measure(options: argparse.Namespace, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Prints as it goes; gives the report's "phases", "host" and "left_out"."""
    torch.manual_seed(0)
    gate_up, down = weights = expert_weights(shape, torch.bfloat16, device)
    inputs, clock = make_inputs(shape, options.routing, torch.bfloat16, device), Clock(device)
    run = partial(expert_mlp, gate_up_proj=gate_up, down_proj=down, backend=options.backend)
    ours = Contestant("expert_mlp", run, weights)
    contestants, routed = [ours], inputs
    if options.router:
        layer = _layer(shape, *weights, options.backend)
        contestants.append(Contestant("MoE", lambda x, _ids, _weights: layer(x), list(layer.parameters())))
        with torch.no_grad():
            ids_TK, weights_TK, *_ = layer.router(inputs.x_TD)
        routed = inputs._replace(ids_TK=ids_TK, weights_TK=weights_TK.requires_grad_())
    report: dict[str, Any] = {"phases": [], "host": {}, "left_out": {}}
    for contestant in contestants:
        for kind in KINDS:
            known = None
            if contestant is not ours:  # what the experts run for the choice of this router
                known = {row["name"] for row in profile_steps(partial(getattr(ours, kind), routed), 1, device)}
            phase = profile_phase(contestant, inputs, kind, options.rounds, clock, known)
            report["phases"].append(phase)
            print(phase_table(phase, "kernel" if device.type == "cuda" else "operator"), flush=True)

    peer = Contestant("a layer with grouped_mm", partial(grouped_mm, gate_up=gate_up, down=down), weights)
    repeats = 5 * options.rounds  # they are short
    hosts = {c.name: partial(_host_of, c, inputs, repeats) for c in (*contestants, peer)}
    hosts["three grouped_mm"] = partial(_host_of_products, inputs, gate_up, down, repeats)
    print(f"\n{'host, ms until a call returns':32}{'forward':>10}{'backward':>10}")
    for name, measured in hosts.items():
        times, problem = attempt(measured)
        report["left_out" if problem else "host"][name] = problem or times
        figures = "".join(f"{ms:>10.3f}" for ms in (times or {}).values())
        print(f"{name:32}{figures or f'  left out: {problem}'}", flush=True)
    return report


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="profile_layer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", type=parse_shapes, help=f"one of {', '.join(LAYERS)}, or D/F/E/K (qwen3-30b-a3b)")
    add("--tokens", type=int, help="number of tokens (32768)")
    add("--routing", choices=ROUTINGS, default="uniform", help="of expert_mlp; the MoE layer's router chooses itself")
    add("--router", action="store_true", help="also a whole MoE layer")
    add("--backend", choices=list(BACKENDS), help="of the experts (by device)")
    add("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    add("--rounds", type=int, help="steps that are recorded (10); the host's times are over five times as many")
    add("--quick", action="store_true", help="two rounds of a tiny layer, where nothing else is asked for")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    for name, default in (_QUICK if options.quick else _DEFAULTS).items():
        if getattr(options, name) is None:
            setattr(options, name, parse_shapes(str(default)) if name == "shape" else default)
    require(len(options.shape) == 1, "--shape", ",".join(shape.name for shape in options.shape), "one layer")
    for name in ("tokens", "rounds"):
        require(getattr(options, name) > 0, f"--{name}", getattr(options, name), "greater than 0")
    return options


def main(arguments: list[str]) -> int:
    """Print the tables, and write JSON if asked."""
    options = parse(arguments)
    device, shape = resolve_device(options.device, "--device"), replace(options.shape[0], tokens=options.tokens)
    if device.index is not None:
        torch.cuda.set_device(device)
    report: dict[str, Any] = {"machine": describe(device), "shape": vars(shape)}
    report["settings"] = {name: getattr(options, name) for name in ("routing", "router", "backend", "rounds")}
    for entry in report.values():
        print(", ".join(f"{key} {value}" for key, value in entry.items()))
    report |= measure(options, shape, device)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1))
        print(f"written: {options.json}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, RunError) as error:
        sys.exit(str(error))
