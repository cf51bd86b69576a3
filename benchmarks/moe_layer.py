"""One mixture-of-experts layer, side by side with every other way to compute it and with what the card can do at most.

    python benchmarks/moe_layer.py [--shape NAME|D/F/E/K,...] [--tokens T,...] [--only NAME,...] [--json FILE] ...

Timed from (x, expert ids, routing weights) to the output, and to the gradients of x, both expert weights and the
routing weights: sorting and metadata count, the router does not. SwiGLU experts in bf16. FLOPs: 6 T K D F forward,
three times that with the backward, padding not counted. Every round takes another set of random inputs and runs all
implementations in random order; the median of the rounds is shown. Memory: "saved" is what autograd holds for the
backward beside x, the weights, the routing and the output; "peak" what a step had allocated at most beyond what was
there before, gradients included; "first" the seconds of the first forward and step, with what they compile and tune
and no cache on disk has yet. The limits: "bmm", the same products with perfectly equal experts and nothing else;
"dense", an eager SwiGLU MLP of K times the width, whose FLOPs are the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

# Before torch starts the GPU: blocks of many sizes come and go, and a fragmented card would be tidied in mid-round.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from moe_peers import LIMITS, Builder, build, builders
from moe_tables import decode_record, decode_table, draw, error_table, is_wrong, layer_record, layer_table
from torch import Tensor

from dmoe.bench.contest import (
    KINDS,
    Contestant,
    Contestants,
    Deadline,
    Outcome,
    OutOfTime,
    first_calls,
    measure_memory,
    run_decode,
    run_rounds,
)
from dmoe.bench.error import relative_errors
from dmoe.bench.inputs import LAYERS, ROUTINGS, Inputs, Shape, expert_weights, make_inputs
from dmoe.bench.measure import TOO_LONG, Clock, DeviceLost, attempt
from dmoe.cli.arguments import Parser
from dmoe.cli.bench import machine
from dmoe.errors import ConfigError
from dmoe.train.device import resolve_device

_MEASURED = ("forward", "backward", "decode", "error", "memory")
_INPUT_SETS = 3
_ERROR_TOKENS = 512
_QUICK = {"shape": "64/32/8/2", "tokens": "64", "decode": "1,8", "rounds": 2, "error_tokens": 32}


@dataclass
class Run:
    """What one call of the command does, and what it has found so far."""

    options: argparse.Namespace
    device: torch.device
    clock: Clock
    deadline: Deadline
    wanted: dict[str, Builder]
    dtype: torch.dtype = torch.bfloat16
    order: random.Random = field(default_factory=lambda: random.Random(0))
    report: dict[str, Any] = field(default_factory=dict)

    def inputs(self, shape: Shape, routing: str, sets: int) -> list[Inputs]:
        return [make_inputs(shape, routing, self.dtype, self.device) for _ in range(sets)]

    def contestants(self, shape: Shape, weights: tuple[Tensor, Tensor], without: tuple[str, ...] = ()) -> Contestants:
        wanted = {name: builder for name, builder in self.wanted.items() if name not in without}
        contestants, absent = build(wanted, shape, *weights)
        for name, reason in absent.items():
            if self.report["left_out"].get(name) != reason:
                print(f"left out: {name}: {reason}", flush=True)
            self.report["left_out"][name] = reason
        return contestants

    def give_up(self, problems: dict[str, str]) -> None:
        """Leave out what did not come back in time for the rest of the run: it would cost as long each time."""
        for name in [name for name, problem in problems.items() if TOO_LONG in problem and name in self.wanted]:
            del self.wanted[name]
            self.report["left_out"][name] = problems[name]


@contextmanager
def _recorded(
    run: Run, section: str, record: Callable[[], dict[str, Any]], table: Callable[..., str]
) -> Iterator[None]:
    """Whatever ends the block, what it has measured is printed and written."""
    try:
        yield
    finally:
        entry = record()
        if entry["results"]:
            run.report[section].append(entry)
            print(table(entry), flush=True)
            write_report(run)


def time_layer(run: Run, shape: Shape, routing: str, weights: tuple[Tensor, Tensor]) -> None:
    """Forward, step and memory at one number of tokens."""
    kinds = [kind for kind, asked in zip(KINDS, ("forward", "backward")) if asked in run.options.kinds]
    inputs, problem = attempt(partial(run.inputs, shape, routing, _INPUT_SETS))
    if problem:
        print(f"\n{shape.name}, T {shape.tokens}: no inputs: {problem}")
        return
    contestants = run.contestants(shape, weights)
    outcomes = {contestant.name: Outcome() for contestant in contestants}
    with _recorded(run, "layers", partial(layer_record, shape, routing, outcomes), layer_table):
        first_calls(contestants, inputs[0], kinds, outcomes, run.deadline)
        run.give_up({name: problem for name, o in outcomes.items() for problem in o.problems.values()})
        if "memory" in run.options.kinds:
            measure_memory(contestants, inputs[0], outcomes, run.deadline)
        if kinds:
            rounds = run.options.rounds
            run_rounds(
                contestants, inputs, kinds, outcomes, run.clock, run.deadline, rounds=rounds, order=run.order
            )  # fmt: skip


def time_decode(run: Run, shape: Shape, routing: str, weights: tuple[Tensor, Tensor]) -> None:
    """Forwards of few tokens, in a CUDA graph where there is one."""
    contestants = [c for c in run.contestants(shape, weights, ("bmm",)) if isinstance(c, Contestant)]
    outcomes = {contestant.name: Outcome() for contestant in contestants}
    active: dict[int, float] = {}
    record = partial(decode_record, shape, routing, active, outcomes, run.device.type == "cuda")
    # They are short: many rounds cost little, and one has few microseconds to be wrong by.
    rounds = 5 * run.options.rounds
    with _recorded(run, "decode", record, decode_table):
        for tokens in run.options.decode:
            inputs = run.inputs(replace(shape, tokens=tokens), routing, 8)
            experts = sum(batch.ids_TK.unique().numel() for batch in inputs) / len(inputs)
            active[tokens] = experts * sum(w[0].numel() * w.element_size() for w in weights)
            run_decode(contestants, inputs, outcomes, run.clock, run.deadline, rounds=rounds, order=run.order)


def find_errors(run: Run, shape: Shape, routing: str, weights: tuple[Tensor, Tensor]) -> None:
    """Every implementation against fp64."""
    shape = replace(shape, tokens=run.options.error_tokens)
    contestants = [c for c in run.contestants(shape, weights, LIMITS) if isinstance(c, Contestant)]
    (inputs,) = run.inputs(shape, routing, 1)
    results: dict[str, Any] = {}

    def record() -> dict[str, Any]:
        return {"shape": vars(shape), "routing": routing, "results": results}

    with _recorded(run, "errors", record, error_table):
        for contestant in contestants:
            run.deadline.check()
            compute = partial(relative_errors, contestant, inputs, *weights)
            errors, problem = attempt(compute, run.deadline.for_first_call())
            if problem:
                run.deadline.check()
                run.give_up({contestant.name: problem})
            results[contestant.name] = {"errors": errors, "problems": {"error": problem} if problem else {}}


def run_shape(run: Run, shape: Shape, routing: str, decode: bool) -> None:
    """What was asked for of one layer: decoding, or else all but that. The timing first, to see the first calls."""
    torch.manual_seed(0)
    weights, problem = attempt(partial(expert_weights, shape, run.dtype, run.device))
    if problem:
        print(f"\n{shape.name}: no room for its weights: {problem}")
        return
    if decode:
        time_decode(run, shape, routing, weights)
        return
    if {"forward", "backward", "memory"} & set(run.options.kinds):
        for tokens in run.options.tokens:
            time_layer(run, replace(shape, tokens=tokens), routing, weights)
    if "error" in run.options.kinds:
        find_errors(run, shape, routing, weights)


def write_report(run: Run) -> None:
    if run.options.json:
        run.options.json.parent.mkdir(parents=True, exist_ok=True)
        run.options.json.write_text(json.dumps(run.report, indent=1))


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that the figures hang on; None for what is not installed."""
    found = {**machine(device), "cuda": torch.version.cuda}
    for name in ("triton", "transformers"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = None
    return found


def _integers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be integers above 0, such as 4096,16384")
    return numbers


def parse_shapes(text: str) -> list[Shape]:
    shapes = []
    for part in text.split(","):
        sizes = LAYERS.get(part)
        if sizes is None:
            try:
                D, F, E, K = (int(number) for number in part.split("/"))
            except ValueError:
                known = ", ".join(LAYERS)
                raise argparse.ArgumentTypeError(f"{part!r} must be one of {known}, or D/F/E/K") from None
            if min(D, F, E, K) < 1 or K > E:
                raise argparse.ArgumentTypeError(f"{part!r}: must be above 0, and K at most E")
            sizes = (D, F, E, K)
        shapes.append(Shape(part, *sizes, 0))
    return shapes


def _some_of(allowed: tuple[str, ...], text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in allowed:
            raise argparse.ArgumentTypeError(f"{name!r} must be one of {', '.join(allowed)}")
    return names


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="moe_layer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", type=parse_shapes, help=f"{', '.join(LAYERS)} (all), or D/F/E/K; with commas between")
    add("--tokens", type=_integers, help="numbers of tokens (4096,16384,32768)")
    add("--routing", type=partial(_some_of, ROUTINGS), default=["uniform"], help="uniform, skewed, one (uniform)")
    add("--kinds", type=partial(_some_of, _MEASURED), default=list(_MEASURED), help=f"{','.join(_MEASURED)} (all)")
    add("--decode", type=_integers, help="numbers of tokens of the decode kind (1,8,64,256)")
    add("--only", help="implementations to run, beside the bmm limit; with commas between")
    add("--skip", default="", help="implementations to leave out")
    add("--rounds", type=int, help="rounds that the medians are over (10)")
    add("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    add("--quick", action="store_true", help="two rounds of a tiny layer, where nothing else is asked for")
    add("--time-limit", type=float, help="seconds after which to stop with what is there")
    add(
        "--first-call-limit",
        type=float,
        default=120.0,
        help="seconds for compiling and tuning one implementation (120)",
    )
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--plot", type=Path, metavar="FILE", help="draw the percentages of the bmm limit there")
    options = parser.parse_args(arguments)
    defaults: dict[str, Any] = {
        "shape": ",".join(LAYERS),
        "tokens": "4096,16384,32768",
        "decode": "1,8,64,256",
        "rounds": 10,
    }
    if options.quick:
        defaults |= _QUICK
    for name, convert in (("shape", parse_shapes), ("tokens", _integers), ("decode", _integers), ("rounds", int)):
        if getattr(options, name) is None:
            setattr(options, name, convert(defaults[name]))
    options.error_tokens = defaults.get("error_tokens", _ERROR_TOKENS)
    if options.rounds < 1:
        raise ConfigError(f"--rounds is {options.rounds}: must be greater than 0")
    return options


def choose(available: dict[str, Builder], only: str | None, skip: str) -> dict[str, Builder]:
    """The implementations asked for; the bmm limit stays with `only`, as the percentages need it."""
    kept = set(only.split(",")) | {"bmm"} if only else set(available)
    skipped = set(skip.split(",")) - {""}
    unknown = sorted((kept | skipped) - set(available))
    if unknown:
        raise ConfigError(f"--only and --skip: no {', '.join(unknown)}: must be of {', '.join(available)}")
    return {name: builder for name, builder in available.items() if name in kept - skipped}


def main(arguments: list[str]) -> int:
    """Print tables, write JSON and a picture if asked. 1 if the GPU was lost or ours is wrong."""
    options = parse(arguments)
    device = resolve_device(options.device, "--device")
    if device.index is not None:
        torch.cuda.set_device(device)
    end = None if options.time_limit is None else time.monotonic() + options.time_limit
    wanted = choose(builders(device), options.only, options.skip)
    run = Run(options, device, Clock(device), Deadline(end, options.first_call_limit), wanted)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    settings["shape"] = [shape.name for shape in options.shape]
    run.report = {"machine": describe(device), "settings": settings, "left_out": {}, "stopped": None}
    run.report |= {"layers": [], "decode": [], "errors": []}
    print(", ".join(f"{key} {value}" for key, value in run.report["machine"].items()))
    lost = False
    try:
        # Decoding last: what captured graphs held is not all free again for a layer that needs the whole card.
        passes = [decode for decode in (False, True) if not decode or "decode" in options.kinds]
        for decode, routing, shape in itertools.product(passes, options.routing, options.shape):
            run_shape(run, shape, routing, decode)
    except OutOfTime:
        run.report["stopped"] = f"the time limit of {options.time_limit:.0f} s"
    except DeviceLost as error:
        lost = True
        run.report["stopped"] = str(error)
    if run.report["stopped"]:
        print(f"\nstopped: {run.report['stopped']}")
    write_report(run)
    if options.plot and run.report["layers"]:
        draw(run.report["layers"], run.report["machine"], options.plot)
    print("".join(f"written: {path}\n" for path in (options.json, options.plot) if path), end="")
    return 1 if lost or _ours_is_wrong(run.report) else 0


def _ours_is_wrong(report: dict[str, Any]) -> bool:
    results = [pair for entry in report["errors"] for pair in entry["results"].items()]
    errors = [result["errors"] for name, result in results if name.startswith("dmoe-") and result["errors"]]
    return any(is_wrong(e) for e in errors)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(str(error))
