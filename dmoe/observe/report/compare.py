"""Two runs beside each other: curves in one picture, key figures with their difference, what differs in the configs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmoe.observe.report.content import plain
from dmoe.observe.report.figures import MISSING, Card, Experts, elapsed_seconds, key_figures, model_line, status
from dmoe.observe.report.loads import Array
from dmoe.observe.report.maps import load_maps
from dmoe.observe.report.page import render_template
from dmoe.observe.report.run import Run, load_run

if TYPE_CHECKING:
    from dmoe.observe.plots import Picture

# How long a run took is neither.
_LARGER_IS_BETTER = {"tokens_per_second", "mfu"}
_SMALLER_IS_BETTER = {"bits_per_byte", "best_loss", "last_loss", "imbalance", "dead_experts"}


def compare(run_dir: Path, other_dir: Path, png: bool) -> tuple[str, str, bytes, list[Picture]]:
    """The other run's name, the page, its figures as JSON, and the pictures. Errors as in `load_run`."""
    runs = [load_run(run_dir), load_run(other_dir)]
    labels = [run.name for run in runs]
    if labels[0] == labels[1]:  # folders of one name in different places
        labels = [f"{run.folder.resolve().parent.name}/{run.name}" for run in runs]
    experts = [Experts.of(run) for run in runs]
    cards = [key_figures(run, known) for run, known in zip(runs, experts)]
    figures = compare_figures(*cards)
    config = config_differences(runs[0].config, runs[1].config)
    pictures, curves = _draw(runs, experts, labels, png)
    page = render_template(
        "compare.html.jinja",
        runs=[
            {"label": label, "status": status(run), "model": model_line(run, known)}
            for label, run, known in zip(labels, runs, experts)
        ],
        figures=figures,
        config=config,
        has_configs=all(run.config for run in runs),
        pictures=pictures,
        maps=_maps(experts),
    )
    data = {"runs": labels, "figures": figures, "config": config, "curves": curves}
    text = json.dumps(plain(data), allow_nan=False, separators=(",", ":"))
    return runs[1].name, page, text.encode(), pictures


def compare_figures(a: Sequence[Card], b: Sequence[Card]) -> list[dict[str, Any]]:
    """Key figures that either run has: key, label, both texts and numbers, their difference (second less first) as
    number and text, and "better": "first", "second" or ""."""
    firsts, seconds = ({card.key: card for card in cards} for cards in (a, b))
    rows = []
    for key in dict.fromkeys([*firsts, *seconds]):
        cards = [firsts.get(key), seconds.get(key)]
        x, y = (card.number if card else None for card in cards)
        row: dict[str, Any] = {
            "key": key,
            "label": next(card.label for card in cards if card),
            "texts": [card.value if card else MISSING for card in cards],
            "values": [x, y],
            "difference": None,
            "difference_text": MISSING,
            "better": "",
        }
        if x is not None and y is not None:
            row |= {"difference": y - x, "difference_text": _difference(x, y)}
            if x != y and key in _SMALLER_IS_BETTER | _LARGER_IS_BETTER:
                row["better"] = "second" if (y < x) == (key in _SMALLER_IS_BETTER) else "first"
        rows.append(row)
    return rows


def _difference(x: float, y: float) -> str:
    if x == y:
        return "0"
    relative = f" ({(y - x) / abs(x):+.1%})" if x else ""
    return f"{y - x:+,.4g}{relative}" if abs(y - x) < 1e4 else f"{y - x:+,.0f}{relative}"


def config_differences(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """Values that differ, by their dotted name, in the order of the configs; "absent": not a name there."""
    first, second = dict(_flat(a)), dict(_flat(b))
    rows = []
    for name in [*first, *(name for name in second if name not in first)]:
        x, y = first.get(name, "absent"), second.get(name, "absent")
        if x != y or type(x) is not type(y):
            rows.append({"name": name, "values": [x, y]})
    return rows


def _flat(config: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _maps(experts: Sequence[Experts | None]) -> list[dict[str, Any]] | None:
    """The maps of both runs with one scale, if both have experts."""
    known = [e for e in experts if e is not None]
    if len(known) < 2:
        return None
    limit = max(e.log_ratios[1] for e in known)
    return [load_maps(e, limit) for e in known]


def _draw(
    runs: Sequence[Run], experts: Sequence[Experts | None], labels: Sequence[str], png: bool
) -> tuple[list[Picture], dict[str, Any]]:
    """The pictures, and the curves in them by name: for each run [x, y]."""
    from dmoe.observe import plots
    from dmoe.observe.report.compare_pictures import overlay

    steps = [_column(run.train, "step") for run in runs]
    seconds = [elapsed_seconds(run.train) for run in runs]
    tokens = [_column(run.train, "tokens") for run in runs]
    loss, speed = ([_column(run.train, key) for run in runs] for key in ("loss", "tokens_per_second"))
    eval_steps, bits = ([_column(run.evals, key) for run in runs] for key in ("step", "bits_per_byte"))
    specs: list[tuple[str, str, str, str, str, list[Array], list[Array]]] = [
        ("loss_by_step", "Loss by step", "Running medians; lower is better.", "step", "nats per token", steps, loss),
        ("loss_by_tokens", "Loss by tokens", "What each made of the same amount of text.", "tokens", "nats per token",
         tokens, loss),
        ("loss_by_time", "Loss by time", "What each made of the same time, in seconds of training.", "seconds",
         "nats per token", seconds, loss),
        ("bits_by_step", "Validation bits per byte", "On unseen text; lower is better.", "step", "bits per byte",
         eval_steps, bits),
        ("speed", "Throughput", "Tokens per second of training; higher is better.", "step", "tokens per second", steps,
         speed),
    ]  # fmt: skip
    if any(experts):
        pasts = [e.past if e else None for e in experts]
        expert_steps = [p.steps_N if p else np.zeros(0) for p in pasts]
        for key, title, unit, reading in (
            ("max_over_mean", "Load imbalance", "max / mean load", "Mean over layers: 1 is balance."),
            ("router_entropy", "Router entropy", "nats", "Mean over layers: 0 is a router that is certain."),
            (
                "router_confidence",
                "Router confidence",
                "largest score",
                "Mean over layers: 1 is a router that is sure.",
            ),
        ):
            values = [_layer_mean(p.records, key) if p else np.zeros(0) for p in pasts]
            specs.append((key, title, reading, "step", unit, expert_steps, values))
    pictures, curves = [], {}
    with plots.style(png):
        for name, title, reading, x_label, y_label, xs, ys in specs:
            points = [_finite(x, y) for x, y in zip(xs, ys)]
            if any(len(x) for x, _ in points):
                picture, drawn = overlay(name, title, reading, x_label, y_label, points, labels)
                pictures.append(picture)
                curves[name] = [{x_label: x, "value": y} for x, y in drawn]
    return pictures, curves


def _column(records: Sequence[dict[str, Any]], key: str) -> Array:
    return np.array([record.get(key) for record in records], dtype=float)


def _layer_mean(records: Sequence[dict[str, Any]], key: str) -> Array:
    """Mean over layers of each line's `key`, float [N]; NaN where it is not known."""
    means = []
    for record in records:
        known = [v for v in record.get(key) or [] if v is not None]
        means.append(sum(known) / len(known) if known else math.nan)
    return np.array(means, dtype=float)


def _finite(x: Array, y: Array) -> tuple[Array, Array]:
    good = np.isfinite(x) & np.isfinite(y)
    return x[good], y[good]
