"""Dense against mixture of experts: equal active parameters, equal FLOPs a token, the same tokens in the same order.

    python benchmarks/dense_vs_moe.py [--train.steps N ...]      options of `dmoe train`

Trains the presets tiny-dense and tiny-moe, writes benchmarks/out/dense_vs_moe.{json,png}, and exits with 1 if the
mixture's validation loss is not the lower one. About 8 minutes on two cores with the default steps.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dmoe.cli.bench import machine
from dmoe.cli.options import build_config
from dmoe.observe.metrics_log import read_metrics
from dmoe.train import train
from dmoe.train.device import resolve_device

OUT = Path(__file__).parent / "out"
COLOURS = {"tiny-dense": "#8a8f98", "tiny-moe": "#d1495b"}


def run(preset: str, options: list[str]) -> dict[str, Any]:
    """Train one preset anew and return its curves and sizes."""
    run_dir = OUT / "runs" / preset
    shutil.rmtree(run_dir, ignore_errors=True)
    config = build_config(preset, ["--train.eval_every", "50", *options, "--run_dir", str(run_dir)])
    result = train(config)
    if result.evaluation is None:
        raise SystemExit("interrupted")
    records = read_metrics(run_dir / "metrics.jsonl")
    return {
        **json.loads((run_dir / "model.json").read_text()),
        "train": [(r["tokens"], r["loss"]) for r in records if r["kind"] == "train"],
        "validation": [(r["step"], r["loss"]) for r in records if r["kind"] == "eval" and not r["whole"]],
        "tokens_per_step": config.train.batch_size * config.train.seq_len,
        "final_loss": result.evaluation.loss,
        "final_bits_per_byte": result.evaluation.bits_per_byte,
        "zlib_bits_per_byte": result.zlib_bits_per_byte,
        "device": config.train.device,
    }


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Training curves faint, validation curves with markers, over tokens."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, result in results.items():
        label = (
            f"{name}: {result['num_active_params'] / 1e6:.2f} M active of {result['num_params'] / 1e6:.2f} M, "
            f"{result['final_bits_per_byte']:.3f} bits/byte in the end"
        )
        axes.plot(*zip(*result["train"]), color=COLOURS[name], alpha=0.3, linewidth=1)
        points = [(step * result["tokens_per_step"], loss) for step, loss in result["validation"]]
        axes.plot(*zip(*points), color=COLOURS[name], marker="o", markersize=3.5, label=label)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss, nats per token (line with points: validation)")
    low = min(r["final_loss"] for r in results.values())
    axes.set_ylim(low - 0.25, low + 2.5)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title("Same FLOPs a token, same tokens: dense against dropless mixture of experts")
    figure.savefig(path, dpi=150)


def main(options: list[str]) -> int:
    """Train both, compare."""
    results = {preset: run(preset, options) for preset in ("tiny-dense", "tiny-moe")}
    device = resolve_device(results["tiny-moe"]["device"])
    summary = {"machine": machine(device), "results": results}
    (OUT / "dense_vs_moe.json").write_text(json.dumps(summary, indent=1))
    draw(results, OUT / "dense_vs_moe.png")
    dense, moe = results["tiny-dense"], results["tiny-moe"]
    print(f"{'':12}{'active M':>10}{'total M':>10}{'MFLOP/token':>13}{'val loss':>10}{'bits/byte':>11}")
    for name, r in results.items():
        print(
            f"{name:12}{r['num_active_params'] / 1e6:>10.2f}{r['num_params'] / 1e6:>10.2f}"
            f"{r['flops_per_token'] / 1e6:>13.2f}{r['final_loss']:>10.4f}{r['final_bits_per_byte']:>11.4f}"
        )
    print(f"zlib -9: {moe['zlib_bits_per_byte']:.4f} bits/byte; picture: {OUT / 'dense_vs_moe.png'}")
    return 0 if moe["final_loss"] < dense["final_loss"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
