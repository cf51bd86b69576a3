"""Experts in 8 bits against bf16: errors, a short training run of each, and on a Hopper GPU their speed.

    python benchmarks/fp8_accuracy.py                 relative errors of the output and of every gradient
    python benchmarks/fp8_accuracy.py --train 100     also trains the default model, 100 short steps in fp32, bf16, fp8
    python benchmarks/fp8_accuracy.py --speed         times both at the shapes of real models, with the parts of fp8

Errors are |got - exact| / |exact| in the 2-norm, exact being the reference backend in fp64 on the same bf16 numbers.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.bench.layer import Shape
from dmoe.cli.bench import machine
from dmoe.ops import expert_mlp, fp8, scaled
from dmoe.ops.grouped import row_metadata

OUT = Path(__file__).parent / "out"
NAMES = ("y", "x", "weights", "gate_up", "down")
PRECISIONS = {"bf16": "same", "fp8": "fp8"}
# Widths of the models divided by 4 or 8, and fewer experts, so that fp64 takes seconds.
SMALL = (
    Shape("olmoe / 4", 512, 256, 16, 4, 1024),
    Shape("qwen3-30b-a3b / 4", 512, 192, 32, 8, 1024),
    Shape("mixtral / 8", 512, 1792, 4, 2, 512),
)
LARGE = (
    Shape("olmoe", 2048, 1024, 64, 8, 32768),
    Shape("qwen3-30b-a3b", 2048, 768, 128, 8, 16384),
    Shape("mixtral", 4096, 14336, 8, 2, 16384),
    Shape("deepseek-v3-like", 7168, 2048, 64, 8, 16384),
)


def make_tensors(shape: Shape, device: torch.device, outliers: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    """bf16 leaves [x, weights, gate_up, down] with values of order 1, expert ids, and an output gradient.

    `outliers`: a hundredth of the channels of x is 30 times larger, as in the residual stream of trained models.
    """
    torch.manual_seed(0)
    D, W, E, T = shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.tokens
    x = torch.randn(T, D, device=device)
    if outliers:
        x[:, ::100] *= 30
    weights, ids = torch.randn(T, E, device=device).softmax(-1).topk(shape.top_k)
    bf16 = torch.bfloat16  # from the start: the weights of the largest shape in fp32 would not leave room for the rest
    gate_up = torch.randn(E, 2 * W, D, device=device, dtype=bf16) * D**-0.5
    down = torch.randn(E, D, W, device=device, dtype=bf16) * W**-0.5
    leaves = [t.requires_grad_() for t in (x.bfloat16(), weights, gate_up, down)]
    return leaves, ids, torch.randn_like(x).bfloat16()


def run(leaves: list[Tensor], ids: Tensor, grad: Tensor, **choice: str) -> list[Tensor]:
    x, weights, gate_up, down = leaves
    y = expert_mlp(x, ids, weights, gate_up, down, **choice)  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def print_errors(device: torch.device) -> None:
    print(f"{'relative error':34}" + "".join(f"{name:>10}" for name in ("y", *(f"d {n}" for n in NAMES[1:]))))
    for shape in SMALL:
        for outliers in (False, True):
            leaves, ids, grad = make_tensors(shape, device, outliers)
            exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
            exact = run(exact_leaves, ids, grad.double(), backend="reference")
            for name, precision in PRECISIONS.items():
                got = run(leaves, ids, grad, precision=precision)
                errors = [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact)]
                label = f"{shape.name}{', outliers' if outliers else ''}"
                print(f"{label:28}{name:>6}" + "".join(f"{error:>10.4f}" for error in errors), flush=True)


def print_training(steps: int, device: torch.device, seed: int) -> None:
    """Final validation loss of the default model, 512 tokens a step in the same order, in fp32, bf16 and fp8."""
    from dmoe.cli.options import build_config
    from dmoe.observe.metrics_log import read_metrics
    from dmoe.train import train

    losses = {}
    # fp32 shows how far apart runs end that differ in their rounding alone.
    for name, run_precision, precision in (("fp32", "fp32", "same"), ("bf16", "bf16", "same"), ("fp8", "bf16", "fp8")):
        run_dir = OUT / "runs" / f"precision-{name}-{seed}"
        shutil.rmtree(run_dir, ignore_errors=True)
        options = {
            "train.steps": steps, "train.batch_size": 4, "train.micro_batch_size": 4, "train.seq_len": 128,
            "optim.warmup_steps": steps // 10, "data.val_fraction": 0.005, "train.precision": run_precision,
            "train.device": device.type, "train.seed": seed, "train.eval_every": 0, "train.sample_tokens": 0,
            "train.tensorboard": "false", "checkpoint.every": 0, "model.moe.precision": precision, "run_dir": run_dir,
        }  # fmt: skip
        result = train(build_config("tiny-moe", [f"--{key}={value}" for key, value in options.items()]))
        assert result.evaluation is not None
        records = [r for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == "train"]
        losses[name] = (records[-1]["loss"], result.evaluation.loss)
    print(f"\n{steps} steps of the default model, seed {seed}{'train loss':>14}{'held-out loss':>16}")
    for name, (train_loss, held_out) in losses.items():
        print(f"{name:>38}{train_loss:>14.4f}{held_out:>16.4f}")


def milliseconds(function: Callable[[], object], rounds: int = 20) -> float:
    """Median time on the GPU, after a warm-up."""
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def forward(leaves: list[Tensor], ids: Tensor, precision: str) -> Tensor:
    x, weights, gate_up, down = leaves
    with torch.no_grad():
        return expert_mlp(x, ids, weights, gate_up, down, precision=precision)


def print_speed(device: torch.device) -> None:
    """ms of both precisions whole, then of the up projection alone and of the roundings around it."""
    for shape in LARGE:
        leaves, ids, grad = make_tensors(shape, device)
        print(f"\n{shape.name}: T {shape.tokens}, {shape.forward_flops() / 1e12:.2f} TFLOP forward", flush=True)
        for fast in (False, True):
            scaled.FAST_ACCUMULATION = fast
            for name, precision in PRECISIONS.items():
                if name == "bf16" and fast:
                    continue
                ahead = milliseconds(partial(forward, leaves, ids, precision))
                both = milliseconds(partial(run, leaves, ids, grad, precision=precision))
                label = name + (" fast accumulation" if fast else "")
                print(f"  {label:24} forward {ahead:8.3f} ms, forward and backward {both:8.3f} ms", flush=True)
        print_parts(leaves, ids)


@torch.no_grad()
def print_parts(leaves: list[Tensor], ids: Tensor) -> None:
    x, weights, gate_up, down = leaves
    order_R, inverse_TK, offsets_E = fp8._sort(ids, gate_up, False)
    tokens_R, experts_R, scale_R1 = row_metadata(order_R, ids, weights)
    tile, _ = fp8._gradient_tiles(x, ids, down)
    x_RD = fp8._spread(x, tokens_R, inverse_TK)
    x8, rows8, columns8 = (
        scaled.quantise_rows(x_RD), scaled.quantise_rows(gate_up), scaled.quantise_columns(gate_up)
    )  # fmt: skip
    h_RH = scaled.scaled_product(x8, rows8, offsets_E)
    h8 = scaled.quantise_rows(h_RH)
    a_RF = h_RH[:, : h_RH.shape[1] // 2].contiguous()

    def product(rows: scaled.Scaled, other: scaled.Scaled, fast: bool) -> Tensor:
        scaled.FAST_ACCUMULATION = fast
        return scaled.scaled_product(rows, other, offsets_E)

    parts: dict[str, Callable[[], object]] = {
        "sort": lambda: fp8._sort(ids, gate_up, False),
        "up product, torch's bf16": lambda: F.grouped_mm(x_RD, gate_up.transpose(1, 2), offs=offsets_E),
        "up product, fp8": lambda: product(x8, rows8, False),
        "up product, fp8, fast": lambda: product(x8, rows8, True),
        "its data gradient, torch's bf16": lambda: F.grouped_mm(h_RH, gate_up, offs=offsets_E),
        "its data gradient, fp8": lambda: product(h8, columns8, False),
        "its data gradient, fp8, fast": lambda: product(h8, columns8, True),
        "its weight gradient, bf16": lambda: fp8._weight_gradient(h_RH, x_RD, offsets_E, False, tile),
        "round its weights": lambda: scaled.quantise_rows(gate_up),
        "round them transposed": lambda: scaled.quantise_columns(gate_up),
        "round x and copy it to its rows": lambda: scaled.quantise_picks(x, tokens_R, inverse_TK),
        "copy x to its rows": lambda: fp8._spread(x, tokens_R, inverse_TK),
        "sum the rows of a token": lambda: fp8._sum_picks(x_RD, inverse_TK),
        "activation to fp8": lambda: fp8._activate(h_RH, None, experts_R, scale_R1, "silu", True),
        "its backward": lambda: fp8._activate_backward(a_RF, h_RH, scale_R1, "silu", True),
    }
    for name, part in parts.items():
        print(f"    {name:34}{milliseconds(part):8.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="train for STEPS steps in each precision")
    parser.add_argument("--seeds", type=int, default=1, help="runs in each precision")
    parser.add_argument("--speed", action="store_true", help="only time; needs a GPU")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(machine(device))
    if arguments.speed:
        if device.type != "cuda":
            parser.error("--speed needs a GPU: elsewhere fp8 is emulated")
        print_speed(device)
        return
    print_errors(device)
    if arguments.train:
        for seed in range(arguments.seeds):
            print_training(arguments.train, device, seed)


if __name__ == "__main__":
    main()
