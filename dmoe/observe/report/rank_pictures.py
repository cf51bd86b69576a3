"""Pictures of ranks beside one another: the load of expert-parallel ranks, where their time goes, and their memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dmoe.observe.expert_plots import BALANCE
from dmoe.observe.plots import COLORS, WIDE, Array, Picture, Record, compact, curve, finish, new_figure, render
from dmoe.observe.report.loads import first_step, time_columns

_ORDER = ("blue", "orange", "green", "purple", "cyan", "pink", "brown", "muted", "red")
_MOST_BARS = 40  # ranks in a picture


def rank_load(records: Sequence[Record], layers: list[Any]) -> Picture:
    """Share of the picks on each expert-parallel rank against the uniform one: over time, and by layer.

    `records`: train lines with "rank_load", arrays [L, ranks] of one shape.
    """
    steps = np.array([record["step"] for record in records], dtype=float)
    load_NLR = np.stack([record["rank_load"] for record in records])
    ranks = load_NLR.shape[2]
    last = min(len(records), max(5, len(records) // 20))
    over_time = time_columns(steps, load_NLR.mean(axis=1))[0].T * ranks
    by_layer = load_NLR[-last:].mean(axis=0).T * ranks
    far = float(np.nanmax(np.abs(np.concatenate([over_time, by_layer], axis=1) - 1), initial=0.05))
    fig = new_figure(WIDE, min(4.0, 1.5 + 0.22 * ranks))
    left, right = fig.subplots(1, 2, width_ratios=(3, 2))
    span = (first_step(steps), steps[-1], ranks - 0.5, -0.5)
    _map(left, over_time, far, span, "over time, mean over layers", "step")
    left.xaxis.set_major_formatter(FuncFormatter(compact))
    span = (-0.5, len(layers) - 0.5, ranks - 0.5, -0.5)
    image = _map(right, by_layer, far, span, f"by layer, mean of the last {last} log lines", "MoE layer")
    right.xaxis.set_major_formatter(FuncFormatter(lambda i, _: str(layers[int(i)]) if 0 <= i < len(layers) else ""))
    bar = fig.colorbar(image, ax=right, format=FuncFormatter(lambda v, _: f"{1 + v:.3g}\u00d7"))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    reading = (
        "Rows are ranks: an orange one holds experts that got more than its share of the tokens, and the others wait "
        "for it; the colour of the page is balance."
    )
    return render(fig, "rank_load", "Load of the expert-parallel ranks", reading)


def _map(ax: Axes, ratio: Array, far: float, extent: tuple[float, float, float, float], title: str, label: str) -> Any:
    image = ax.imshow(ratio - 1, cmap=BALANCE, vmin=-far, vmax=far, aspect="auto", interpolation="none",
                      extent=extent)  # fmt: skip
    ax.set_title(title, loc="left", pad=3)
    ax.set_xlabel(label)
    ax.set_ylabel("rank")
    ax.tick_params(length=0)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    return image


def ep_imbalance(train: Sequence[Record]) -> Picture:
    fig, ax = curve(train, "ep_imbalance", "max / mean load of ranks", "purple")
    ax.axhline(1.0, color=COLORS["muted"], linewidth=1.3, linestyle="--", label="balance")
    finish(ax)
    reading = "The busiest rank's share of the picks over the mean share, mean over layers: 1 is balance."
    return render(fig, "ep_imbalance", "Imbalance between ranks", reading)


def ep_imbalance_cost(train: Sequence[Record]) -> Picture:
    fig, ax = curve(train, "ep_imbalance_cost", "of a step", "purple")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g}%"))
    finish(ax)
    reading = "Estimated share of the step time in which ranks wait for the one with the most tokens."
    return render(fig, "ep_imbalance_cost", "What that imbalance costs", reading)


def timeline(summary: dict[str, Any]) -> Picture:
    """Seconds of a step by part of it, a bar a rank, and how long each waited for others."""
    seconds = np.array(summary["step_seconds"], dtype=float)
    ranks = _chosen(seconds)
    regions = {name: np.array(values, dtype=float)[ranks] for name, values in summary["regions"].items()}
    rest = seconds[ranks] - sum(regions.values(), np.zeros(len(ranks)))
    if (rest > 0.01 * seconds[ranks]).any():
        regions["other"] = np.maximum(rest, 0)
    fig = new_figure(WIDE, 1.3 + 0.3 * len(ranks))
    ax = fig.add_subplot()
    names = summary["rank_ids"]
    _stack(ax, regions, [f"rank {names[r]}" for r in ranks], 1000)
    if summary.get("waiting"):
        waiting = np.array(summary["waiting"], dtype=float)[ranks] * 1000
        place = np.arange(len(ranks)) + 0.43
        ax.barh(place, waiting, height=0.12, color=COLORS["red"], label="of that, waiting for others")
    ax.set_xlabel("milliseconds a step")
    _legend_above(ax)
    first, last = (summary.get("steps") or [None, None])[:2]
    which = "" if first is None else f" Mean of steps {first} to {last}."
    more = "" if len(ranks) == len(seconds) else f" The slowest {len(ranks)} of {len(seconds)} ranks."
    reading = (
        "Each part without what is nested in it. A red line is the time in which a rank waits: the rank with the "
        f"shortest is the one that the others wait for.{which}{more}"
    )
    return render(fig, "timeline", "Where the time of a step goes", reading)


def memory_peak(ranks: Sequence[dict[str, Any]], estimate: dict[str, float]) -> Picture:
    """Bytes by what they are for at each rank's peak, with the estimate of a dry run beside them."""
    worst = max(ranks, key=lambda rank: float(rank["peak_bytes"]))
    chosen = [ranks[i] for i in _chosen(np.array([rank["peak_bytes"] for rank in ranks], dtype=float))]
    bars = [(f"rank {rank['rank']}", rank["categories"]) for rank in chosen]
    if estimate:
        bars.append((f"estimate, rank {worst['rank']}", estimate))
    names = list(dict.fromkeys(name for _, categories in bars for name in categories))
    parts = {name: np.array([categories.get(name) or 0 for _, categories in bars], dtype=float) for name in names}
    fig = new_figure(WIDE, 1.3 + 0.3 * len(bars))
    ax = fig.add_subplot()
    unit, name = _unit(float(sum(parts.values(), np.zeros(len(bars))).max()))
    _stack(ax, parts, [label for label, _ in bars], 1 / unit)
    ax.set_xlabel(f"{name} at the peak")
    _legend_above(ax)
    more = "" if len(chosen) == len(ranks) else f" The {len(chosen)} of {len(ranks)} ranks with the most."
    reading = f"What was in memory at the moment when most of it was taken, by what it is for.{more}"
    return render(fig, "memory_peak", "Memory at the peak", reading)


def memory_phases(rank: dict[str, Any]) -> Picture:
    """The same by phase of the step, for one rank."""
    phases = {phase: values for phase, values in rank["phases"].items() if values}
    names = list(dict.fromkeys(name for values in phases.values() for name in values))
    parts = {name: np.array([values.get(name) or 0 for values in phases.values()], dtype=float) for name in names}
    fig = new_figure(height=1.5 + 0.35 * len(phases))
    ax = fig.add_subplot()
    unit, name = _unit(rank["peak_bytes"])
    _stack(ax, parts, list(phases), 1 / unit)
    ax.set_xlabel(name)
    _legend_above(ax, columns=3)
    reading = f"Rank {rank['rank']}, which has the highest peak: what is held in each part of a step."
    return render(fig, "memory_phases", "Memory by phase", reading)


def memory_curve(rank: dict[str, Any]) -> Picture:
    points = np.array(rank["curve"], dtype=float)
    fig = new_figure()
    ax = fig.add_subplot()
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", linewidth=0.8)
    ax.tick_params(length=0)
    unit, name = _unit(float(points[:, 1].max()))
    ax.fill_between(points[:, 0], points[:, 1] / unit, step="post", color=COLORS["blue"], alpha=0.25, linewidth=0)
    ax.plot(points[:, 0], points[:, 1] / unit, drawstyle="steps-post", color=COLORS["blue"], linewidth=1.3)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("seconds")
    ax.set_ylabel(name)
    reading = f"Memory taken by rank {rank['rank']} through the measured step; the peak sets what the run needs."
    return render(fig, "memory_curve", "Memory through a step", reading)


def _unit(most: float) -> tuple[int, str]:
    """The unit in which `most` bytes are a number that can be read."""
    return next((u for u in ((2**30, "GiB"), (2**20, "MiB")) if most >= u[0] / 2), (2**10, "KiB"))


def _chosen(values: Array) -> list[int]:
    """Indices of the ranks to draw, in order: all, or those with the largest values."""
    order = np.argsort(-values, kind="stable")[:_MOST_BARS]
    return sorted(int(i) for i in order)


def _stack(ax: Axes, parts: dict[str, Array], labels: list[str], scale: float) -> None:
    """Horizontal bars, one a label from top to bottom, each made of `parts` [bars]."""
    left = np.zeros(len(labels))
    parts = {name: values for name, values in parts.items() if values.any()}
    for i, (name, values) in enumerate(parts.items()):
        color = COLORS[_ORDER[i % len(_ORDER)]]
        ax.barh(np.arange(len(labels)), values * scale, left=left, height=0.7, color=color, label=name,
                alpha=0.85 if i < len(_ORDER) else 0.45, linewidth=0)  # fmt: skip
        left = left + values * scale
    ax.set_yticks(np.arange(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    ax.xaxis.set_major_formatter(FuncFormatter(compact))


def _legend_above(ax: Axes, columns: int = 10) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, fontsize=9, handlelength=1, columnspacing=1.2)
