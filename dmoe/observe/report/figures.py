"""The key figures of a run, in words and as numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dmoe.observe.report.loads import (
    Array,
    LoadHistory,
    busiest_experts,
    dead_experts,
    dead_windows,
    history,
    log_ratios,
)
from dmoe.observe.report.run import Record, Run, get

MISSING = "\u2013"  # an en dash


@dataclass(frozen=True)
class Card:
    """One key figure. `key` is its stable name in the page, as data-card; `number` its value without rounding."""

    key: str
    label: str
    value: str
    note: str = ""
    number: float | None = None


class Experts:
    """What a run's lines say about its experts, each thing worked out once."""

    def __init__(self, past: LoadHistory) -> None:
        self.past = past

    @classmethod
    def of(cls, run: Run) -> Experts | None:
        """None for a dense run."""
        past = history(run.train)
        return None if past is None else cls(past)

    @cached_property
    def dead_windows(self) -> Array:
        return dead_windows(self.past)

    @cached_property
    def log_ratios(self) -> tuple[Array, float]:
        return log_ratios(self.past)

    @cached_property
    def dead(self) -> list[dict[str, Any]]:
        return dead_experts(self.past, self.dead_windows)

    @cached_property
    def busiest(self) -> list[dict[str, Any]]:
        return busiest_experts(self.past)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Each MoE layer's max_over_mean, router_entropy, router_confidence and dropped of the last line, its least
        and most loaded expert there, and its number of dead experts."""
        last, load_LE = self.past.records[-1], self.past.load_NLE[-1]
        rows = []
        for i, layer in enumerate(self.past.layers):
            shares = load_LE[i][np.isfinite(load_LE[i])]
            keys = ("max_over_mean", "router_entropy", "router_confidence", "dropped")
            row: dict[str, Any] = {"layer": layer} | {key: _item(last.get(key), i) for key in keys}
            least, most = (float(shares.min()), float(shares.max())) if len(shares) else (None, None)
            rows.append(row | {"least": least, "most": most, "dead_experts": int(self.dead_windows[-1, i].sum())})
        return rows


def status(run: Run) -> str:
    """How far the run is: "step 640 of 1,000"."""
    last = max(record["step"] for record in [*run.train, *run.evals])
    total = get(run.config, "train", "steps")
    if not isinstance(total, int):
        return f"step {last:,}"
    return f"finished, {last:,} steps" if last >= total else f"step {last:,} of {total:,}"


def model_line(run: Run, experts: Experts | None) -> str:
    """The model in one line; what is not known is left out."""
    parts = []
    layers = get(run.config, "model", "num_layers")
    if layers is not None:
        mixtures = len(experts.past.layers) if experts else 0
        mixed = isinstance(layers, int) and 0 < mixtures < layers
        kind = "" if mixed else "MoE " if mixtures else "dense "
        parts.append(f"{layers} {kind}layers" + (f", {mixtures} of them MoE" if mixed else ""))
    if experts:
        top_k = get(run.config, "model", "moe", "top_k")
        parts.append(f"{experts.past.load_NLE.shape[2]} experts" + (f", top-{top_k}" if top_k is not None else ""))
    total, active = run.model.get("num_params"), run.model.get("num_active_params")
    if total is not None:
        parts.append(
            f"{count(total)} parameters" + (f", {count(active)} active" if active not in (None, total) else "")
        )
    if run.train and run.train[-1].get("tokens") is not None:
        parts.append(f"{count(run.train[-1]['tokens'])} tokens trained")
    return " · ".join(parts)


def key_figures(run: Run, experts: Experts | None) -> list[Card]:
    """The cards at the head of the page."""
    cards = [_compression_card(run), *_loss_cards(run)]
    speed, step = median(run.train, "tokens_per_second"), median(run.train, "step_seconds")
    step_note = "" if step is None else f"median; {step:.3g} s per step"
    speed_text = MISSING if speed is None else f"{speed:,.0f}"
    cards.append(Card("tokens_per_second", "Tokens per second", speed_text, step_note, speed))
    memory = max((r["memory_gib"] for r in run.train if r.get("memory_gib") is not None), default=None)
    memory_note = "" if memory is None else f"peak memory {memory:.3g} GiB"
    seconds = training_seconds(run.train)
    cards.append(Card("time", "Training time", duration(seconds), memory_note, seconds))
    mfu, tflops = median(run.train, "mfu"), median(run.train, "model_tflops")
    tflops_note = "" if tflops is None else f"median; {tflops:.3g} TFLOP/s"
    cards.append(Card("mfu", "Model FLOPs utilisation", MISSING if mfu is None else f"{mfu:.1%}", tflops_note, mfu))
    return cards + ([] if experts is None else _expert_cards(experts))


def _compression_card(run: Run) -> Card:
    label = "Validation bits per byte"
    evals = [record for record in run.evals if record.get("bits_per_byte") is not None]
    # The whole text is the better measure, however late a part was read after it.
    evals = [record for record in evals if record.get("whole")] or evals
    if not evals:
        return Card("bits_per_byte", label, MISSING, "no validation yet")
    bits, zlib = evals[-1]["bits_per_byte"], evals[-1].get("zlib_bits_per_byte")
    note = f"step {evals[-1]['step']:,}"
    if zlib:
        note = f"zlib -9: {zlib:.3f}, so {abs(1 - bits / zlib):.0%} {'fewer' if bits < zlib else 'more'} bits"
    return Card("bits_per_byte", label, f"{bits:.3f}", note, bits)


def _loss_cards(run: Run) -> list[Card]:
    losses = [(record["loss"], record["step"]) for record in run.train if record.get("loss") is not None]
    if not losses:
        return [Card("best_loss", "Best training loss", MISSING), Card("last_loss", "Last training loss", MISSING)]
    best, step = min(losses)
    last = run.train[-1].get("loss")
    return [
        Card("best_loss", "Best training loss", f"{best:.3f}", f"nats per token, step {step:,}", best),
        Card("last_loss", "Last training loss", "not finite" if last is None else f"{last:.3f}",
             f"nats per token, step {run.train[-1]['step']:,}", last),
    ]  # fmt: skip


def _expert_cards(experts: Experts) -> list[Card]:
    """The least balanced layer of the last line, and the experts that get next to no token."""
    known = [row for row in experts.rows if row["max_over_mean"] is not None]
    cards = []
    if known:
        worst = max(known, key=lambda row: row["max_over_mean"])
        note, ratio = f"max / mean load, layer {worst['layer']}", worst["max_over_mean"]
        cards.append(Card("imbalance", "Most imbalanced layer", f"{ratio:.2f}\u00d7", note, ratio))
    layers, number = experts.past.load_NLE.shape[1:]
    dead, window = len(experts.dead), experts.past.window
    note = f"of {layers * number:,}: under 1 % of the mean load over {window} log line{'s' if window > 1 else ''}"
    cards.append(Card("dead_experts", "Dead experts", f"{dead:,}", note, dead))
    return cards


def training_seconds(train: Sequence[Record]) -> float | None:
    """Seconds of training; where a resumed process counted from 0 again, the sum over the processes."""
    times = elapsed_seconds(train)
    known = times[np.isfinite(times)]
    return float(known[-1]) if len(known) else None


def elapsed_seconds(train: Sequence[Record]) -> Array:
    """Seconds of training at each line, float [N], over the processes of a resumed run; NaN where not known."""
    out = np.full(len(train), np.nan)
    before, last = 0.0, 0.0
    for i, record in enumerate(train):
        elapsed = record.get("elapsed_seconds")
        if elapsed is None:
            continue
        if elapsed < last:
            before += last
        last = elapsed
        out[i] = before + elapsed
    return out


def median(records: Sequence[Record], key: str) -> float | None:
    values = [record[key] for record in records if record.get(key) is not None]
    return statistics.median(values) if values else None


def count(value: float) -> str:
    """A count with its unit: 12300000 -> "12.3 M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:#.3g} {unit}" if value / size < 99.95 else f"{value / size:.0f} {unit}"
    return f"{value:g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def _item(values: Any, i: int) -> Any:
    return values[i] if values and i < len(values) else None
