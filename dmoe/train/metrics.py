"""Metrics of a run: to the console, to metrics.jsonl and to TensorBoard."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from dmoe.moe import LoadSummary
from dmoe.observe.metrics_log import MetricsWriter

# Scalars of a "train" record that TensorBoard gets, under "train/".
_SCALARS = (
    "loss", "aux_loss", "z_loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "model_tflops", "mfu",
    "memory_gib", "skipped_steps",
)  # fmt: skip


def load_fields(summaries: dict[str, LoadSummary]) -> dict[str, Any]:
    """The part of a "train" record that describes the experts; empty for a dense model.

    "dropped", if there was any, is the share of each layer's picks that went to no expert.
    """
    layers = list(summaries.values())
    if not layers:
        return {}
    fields = {
        "aux_loss": sum(s.aux_loss for s in layers) / len(layers),
        "z_loss": sum(s.z_loss for s in layers) / len(layers),
        "moe_layers": [int(name.split(".")[1]) for name in summaries],
        "expert_load": [[round(share, 5) for share in s.load] for s in layers],
        "router_entropy": [s.router_entropy for s in layers],
        "max_over_mean": [s.max_over_mean for s in layers],
        "dead_experts": [s.dead_experts for s in layers],
    }
    if any(s.dropped for s in layers):
        fields["dropped"] = [s.dropped / max(sum(s.tokens_per_expert), 1) for s in layers]
    return fields


def format_line(record: dict[str, Any], total_steps: int) -> str:
    """One line of the console for a record."""
    step = f"step {record['step']:>{len(str(total_steps))}}/{total_steps}"
    if record["kind"] == "event":
        return f"{step}  {record['message']}"
    if record["kind"] == "eval":
        what = "whole held-out text" if record["whole"] else "part of the held-out text"
        return (
            f"{step}  validation  loss {record['loss']:.4f}  {record['bits_per_byte']:.4f} bits/byte on the {what}"
            f"  (zlib -9: {record['zlib_bits_per_byte']:.4f})"
        )
    line = f"{step}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  grad norm {record['grad_norm']:.2f}"
    line += f"  {record['tokens_per_second']:,.0f} tokens/s  MFU {record['mfu']:.0%}"
    if "max_over_mean" in record:
        line += f"  aux {record['aux_loss']:.3f}  busiest expert {max(record['max_over_mean']):.2f}x"
    if "dropped" in record:
        line += f"  dropped {sum(record['dropped']) / len(record['dropped']):.1%}"
    return line


class Console:
    """A progress bar with lines above it on a terminal; lines alone elsewhere."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self._total = total_steps
        self._progress: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._progress = Progress(*columns)
            self._progress.start()
            self._task = self._progress.add_task("", total=total_steps, completed=start_step)

    def advance(self, step: int, loss: float) -> None:
        """Steps done so far, and the last loss."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=f"loss {loss:.3f}")

    def print(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class SilentLogger:
    """Stands in for `MetricsLogger` on every rank but the first."""

    def __init__(self) -> None:
        self.console = self

    def write(self, record: dict[str, Any]) -> None:
        """Does nothing."""

    def advance(self, step: int, loss: float) -> None:
        """Does nothing."""

    def print(self, line: str) -> None:
        """Does nothing."""

    def __enter__(self) -> SilentLogger:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class MetricsLogger:
    """Sends each record to the three places. Use as a context manager."""

    def __init__(self, run_dir: Path, total_steps: int, start_step: int, *, tensorboard: bool) -> None:
        self._total = total_steps
        self._file = MetricsWriter(run_dir / "metrics.jsonl")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a run that is resumed had logged after its checkpoint
            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)
        self.console = Console(total_steps, start_step)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(record)
        self.console.print(format_line(record, self._total))
        if self._board is not None:
            self._write_board(record)

    def _write_board(self, record: dict[str, Any]) -> None:
        step, kind = record["step"], record["kind"]
        if kind == "eval":
            self._board.add_scalar("eval/loss", record["loss"], step)
            self._board.add_scalar("eval/bits_per_byte", record["bits_per_byte"], step)
        if kind != "train":
            return
        for name in _SCALARS:
            if name in record and math.isfinite(record[name]):
                self._board.add_scalar(f"train/{name}", record[name], step)
        for i, layer in enumerate(record.get("moe_layers", [])):
            for name in ("max_over_mean", "router_entropy", "dead_experts", "dropped"):
                if name not in record:
                    continue
                self._board.add_scalar(f"experts/{name}/layer_{layer}", record[name][i], step)
            for expert, share in enumerate(record["expert_load"][i]):
                self._board.add_scalar(f"expert_load/layer_{layer}/expert_{expert}", share, step)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.console.close()
        self._file.close()
        if self._board is not None:
            self._board.close()
