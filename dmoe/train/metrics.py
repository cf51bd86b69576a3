"""Metrics of a run: to the console, to metrics.jsonl and to TensorBoard."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dmoe.moe import LoadSummary
from dmoe.observe.metrics_log import MetricsWriter
from dmoe.observe.routing import RoutingSummary
from dmoe.train.board import Board


def load_fields(summaries: dict[str, LoadSummary], cost: Callable[[float], float] | None = None) -> dict[str, Any]:
    """The part of a "train" record that describes the experts; empty for a dense model.

    "dropped", if there was any, is the share of each layer's picks that went to no expert. With expert parallelism
    "rank_load" is the share of each layer's picks on each of its ranks; "ep_imbalance" the load of the busiest rank
    over the mean, mean over forwards and layers; and "ep_imbalance_cost" what `cost` makes of it.
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
        "router_confidence": [s.confidence for s in layers],
        "max_over_mean": [s.max_over_mean for s in layers],
        "dead_experts": [s.dead_experts for s in layers],
    }
    if any(s.dropped for s in layers):
        fields["dropped"] = [s.dropped / max(sum(s.tokens_per_expert), 1) for s in layers]
    if layers[0].rank_load:
        fields["rank_load"] = [[round(share, 5) for share in s.rank_load] for s in layers]
        fields["ep_imbalance"] = imbalance = sum(s.rank_max_over_mean for s in layers) / len(layers)
        if cost is not None:
            fields["ep_imbalance_cost"] = cost(imbalance)
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
    if "ep_imbalance" in record:
        line += f"  busiest rank {record['ep_imbalance']:.2f}x"
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

    def write_routing(self, summary: RoutingSummary | None) -> None:
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
        self._board = Board(run_dir / "tensorboard", start_step) if tensorboard else None
        self.console = Console(total_steps, start_step)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(record)
        self.console.print(format_line(record, self._total))
        if self._board is not None:
            self._board.write(record)

    def write_routing(self, summary: RoutingSummary | None) -> None:
        """How a piece of text is routed, to TensorBoard alone: it has a file of its own."""
        if self._board is not None and summary is not None:
            self._board.write_routing(summary)

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.console.close()
        self._file.close()
        if self._board is not None:
            self._board.close()
