"""What the statistics of routing cost a training step.

    python benchmarks/routing_overhead.py [--sizes tiny,small,...] [--steps N] [--device D] [--json FILE] [--smoke]

One model, its trainer's step (forward, backward, norm, clipping, AdamW) on the same tokens, with statistics and
without, step by step in turns whose order changes. "With" is what `dmoe train` does: layers record every forward, a
recorder adds up after each micro-batch; what a line of the log reads at the end is timed apart and spread over
--log-every steps. "Without": no recorder, and entropy and confidence, which are computed along with the balancing loss,
are not computed.
Each model has two rows: with the losses of the router, which need most of the sums anyway, and without any, so that all
sums are there for the statistics alone. Overhead: median over the pairs of steps of the ratio of their times, less 1.
Weights are fp32; on a GPU steps run under bf16 autocast. Nothing is compiled. On a CPU the time is what the process was
running on one core, which other processes disturb less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dmoe.cli.arguments import Parser
from dmoe.cli.bench import machine
from dmoe.config import ModelConfig, MoEConfig, OptimConfig, TrainConfig, require
from dmoe.errors import ConfigError
from dmoe.models import Decoder, count_parameters, get_preset
from dmoe.moe import batch_sums, moe_layers
from dmoe.train.device import resolve_device
from dmoe.train.engine import Batch, Engine
from dmoe.train.metrics import load_fields
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step

# Width, layers, heads, expert width, experts, picks, vocabulary; sequence, sequences a micro-batch.
_SIZES = {
    "small": (256, 4, 4, 256, 16, 4, 4096, 256, 2),
    "olmoe": (2048, 4, 16, 1024, 64, 8, 50304, 4096, 2),
    "qwen3": (2048, 4, 32, 768, 128, 8, 50304, 4096, 2),
}
_OPTIM = OptimConfig(lr=1e-4)
_MICRO_BATCHES = 2


def build(size: str, *, losses: bool) -> tuple[ModelConfig, int, int]:
    """The model, the length of a sequence, and sequences a micro-batch."""
    aux, z = 0.01 * losses, 0.001 * losses
    if size == "tiny":
        config = get_preset("tiny-moe")
        return replace(config, moe=replace(config.moe, aux_loss_coef=aux, z_loss_coef=z)), 128, 4
    D, layers, heads, F, E, K, vocab, seq_len, sequences = _SIZES[size]
    moe = MoEConfig(intermediate_size=F, num_experts=E, top_k=K, aux_loss_coef=aux, z_loss_coef=z)
    config = ModelConfig(
        vocab_size=vocab, hidden_size=D, num_layers=layers, num_heads=heads, num_kv_heads=heads, head_dim=D // heads,
        max_seq_len=seq_len, moe=moe,
    )  # fmt: skip
    return config, seq_len, sequences


def no_decisiveness(probs_TE: Tensor) -> tuple[Tensor, Tensor]:
    """In place of entropy and confidence."""
    zero = probs_TE.new_zeros(())
    return zero, zero


@contextmanager
def without_statistics(engine: Engine) -> Iterator[None]:
    """Layers that record nothing."""
    layers = [layer for part in engine.parts for layer in moe_layers(part).values()]
    kept = [layer.stats for layer in layers]
    for layer in layers:
        layer.stats = None
    with mock.patch.object(batch_sums, "decisiveness", no_decisiveness):
        yield
    for layer, stats in zip(layers, kept):
        layer.stats = stats


def measure(size: str, options: argparse.Namespace, device: torch.device, *, losses: bool) -> dict[str, Any]:
    """Seconds of steps with and without, in pairs."""
    config, seq_len, sequences = build(size, losses=losses)
    seq_len = 16 if options.smoke else seq_len
    model = Decoder.on_meta(config).to_empty(device=device)
    model.init_weights(0)
    train = TrainConfig(
        batch_size=_MICRO_BATCHES * sequences, micro_batch_size=sequences, seq_len=seq_len,
        precision="bf16" if device.type == "cuda" else "fp32",
    )  # fmt: skip
    engine, optimizer = Engine([model], train, device), build_optimizer(model, _OPTIM)
    ids = torch.randint(config.vocab_size, (train.batch_size, seq_len + 1), device=device)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())

    def step() -> float:
        start = _now(device)
        training_step(engine, optimizer, batch, _OPTIM)
        return _now(device) - start

    def step_without() -> float:
        with without_statistics(engine):
            return step()

    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for i in range(options.warmup + options.steps):
        order = [("with", step), ("without", step_without)]
        for name, run in order if i % 2 else order[::-1]:
            taken = run()
            if i >= options.warmup:
                seconds[name].append(taken)
    start = _now(device)
    fields = load_fields(engine.load_summaries())
    line = _now(device) - start
    without = statistics.median(seconds["without"])
    ratios = [a / b for a, b in zip(seconds["with"], seconds["without"])]
    return {
        "size": size, "losses": losses, "tokens": train.batch_size * seq_len, "model": asdict(config),
        "num_params": count_parameters(config, seq_len)["num_params"], "seconds": seconds,
        "with": statistics.median(seconds["with"]), "without": without, "log_line": line,
        "layers": len(fields["expert_load"]),
        "overhead": statistics.median(ratios) - 1 + line / options.log_every / without,
        "quartiles": [q - 1 for q in statistics.quantiles(ratios, n=4)[::2]] if len(ratios) > 1 else None,
    }  # fmt: skip


def _now(device: torch.device) -> float:
    """Seconds, once the device is done."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def row(result: dict[str, Any]) -> str:
    spread = result["quartiles"]
    between = "" if spread is None else f"  (quartiles {spread[0]:+.2%} {spread[1]:+.2%})"
    return (
        f"{result['size']:<6} {'losses' if result['losses'] else 'no losses':<10} {result['tokens']:>6} tokens"
        f"  without {1e3 * result['without']:9.2f} ms  with {1e3 * result['with']:9.2f} ms"
        f"  line of the log {1e3 * result['log_line']:.2f} ms  overhead {result['overhead']:+.2%}{between}"
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="routing_overhead.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", help="some of tiny,small,olmoe,qwen3 (GPU: tiny,olmoe,qwen3; CPU: tiny,small)")
    parser.add_argument("--steps", type=int, default=40, help="pairs of steps that are timed (40)")
    parser.add_argument("--warmup", type=int, default=4, help="pairs before them (4)")
    parser.add_argument("--log-every", type=int, default=10, help="steps to a line of the log (10)")
    parser.add_argument("--device", default="auto", help='"auto", "cpu", "cuda" or "cuda:N"')
    parser.add_argument(
        "--smoke", action="store_true", help="two pairs of the tiny model on the CPU, 16 tokens a sequence"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    if "--smoke" in arguments:
        parser.set_defaults(sizes="tiny", steps=2, warmup=0, device="cpu")
    options = parser.parse_args(arguments)
    for name in ("steps", "log_every"):
        require(getattr(options, name) > 0, f"--{name.replace('_', '-')}", getattr(options, name), "greater than 0")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    device = resolve_device(options.device, "--device")
    if device.type == "cpu":
        torch.set_num_threads(1)
    sizes = (options.sizes or ("tiny,olmoe,qwen3" if device.type == "cuda" else "tiny,small")).split(",")
    for size in sizes:
        require(size in ("tiny", *_SIZES), "--sizes", options.sizes, f"some of tiny,{','.join(_SIZES)}")
    report: dict[str, Any] = {"machine": machine(device), "micro_batches": _MICRO_BATCHES, "results": []}
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), flush=True)
    for size in sizes:
        for losses in (True, False):
            report["results"].append(measure(size, options, device, losses=losses))
            print(row(report["results"][-1]), flush=True)
            if options.json:
                temporary = options.json.with_name(f".{options.json.name}.tmp")
                temporary.write_text(json.dumps(report, indent=1))
                temporary.replace(options.json)  # the whole file or the one before
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ConfigError as error:
        sys.exit(str(error))
