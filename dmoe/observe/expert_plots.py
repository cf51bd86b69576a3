"""Pictures of the experts: how evenly the routers spread the tokens, by layer, over time and at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from dmoe.observe.plots import (
    COLORS,
    WIDE,
    Array,
    Picture,
    Record,
    compact,
    curve,
    dress,
    finish,
    new_figure,
    render,
    series,
)

# The middle is transparent, so a balanced expert has the colour of the page in either theme.
_BLUE, _ORANGE = (0.16, 0.42, 0.92), (0.90, 0.40, 0.04)
_BALANCE = LinearSegmentedColormap.from_list(
    "balance",
    [(0.0, (*_BLUE, 1.0)), (0.25, (*_BLUE, 0.6)), (0.4999, (*_BLUE, 0.0)),
     (0.5001, (*_ORANGE, 0.0)), (0.75, (*_ORANGE, 0.6)), (1.0, (*_ORANGE, 1.0))],
)  # fmt: skip
# From the first layer to the last; of middling brightness throughout, so as to show on white and on black.
_DEPTH = LinearSegmentedColormap.from_list("depth", ["#2d9cdb", "#8b62e8", "#e0558f", "#ee8a2b"])
_RATIO_TICKS = (1, 1.05, 1.1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
_MAX_CELLS = 400_000  # of the heat map, over all layers: bounds the size of the page


def expert_records(train: Sequence[Record]) -> list[Record]:
    """The train lines with expert statistics, of those of the last line's shape; empty for a dense run."""
    records = [record for record in train if record.get("expert_load")]
    if not records:
        return []

    def shape(record: Record) -> tuple[int, ...]:
        return tuple(len(layer) for layer in record["expert_load"])

    return [record for record in records if shape(record) == shape(records[-1])]


def expert_loads(records: Sequence[Record]) -> Array:
    """Shares of the routed rows, float [N lines, layers, experts]; an unknown one is NaN."""
    return np.array([record["expert_load"] for record in records], dtype=float)


def _grid(layers: int, height: float, right: float = 0.2) -> tuple[Figure, list[Axes]]:
    """A wide figure with one panel a layer, of `height` inches, and a margin of `right` inches."""
    columns = 2 if layers == 4 else min(layers, 3 if layers <= 9 else 4 if layers <= 16 else 6)
    rows = math.ceil(layers / columns)
    # Placed by hand: a layout engine takes seconds for dozens of panels.
    top, bottom, gap = 0.30, 0.45, 0.34
    total = top + bottom + rows * height + (rows - 1) * gap
    fig = Figure(figsize=(WIDE, total))
    left, space = 0.55, 0.18
    width = (WIDE - left - right - (columns - 1) * space) / columns
    axes = []
    for i in range(layers):
        row, column = divmod(i, columns)
        x, y = left + column * (width + space), total - top - height - row * (height + gap)
        ax = fig.add_axes((x / WIDE, y / total, width / WIDE, height / total))
        # The lowest panel of each column carries the labels, also where the last row is not full.
        ax.tick_params(length=0, labelleft=column == 0, labelbottom=i + columns >= layers, labelsize=8.5)
        axes.append(ax)
    return fig, axes


def _columns(steps: Array, loads: Array) -> Array:
    """`loads` [N, layers, experts] as equal columns of time [C, layers, experts]: means of the lines that fall into
    each, or a copy of the nearest line."""
    count = min(len(steps), 240, max(30, _MAX_CELLS // (loads.shape[1] * loads.shape[2])))
    edges = np.linspace(steps[0], steps[-1], count + 1)
    column = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, count - 1)
    centres = (edges[:-1] + edges[1:]) / 2
    out = loads[np.abs(steps[None, :] - centres[:, None]).argmin(axis=1)]
    for c in np.unique(column):
        out[c] = loads[column == c].mean(axis=0)
    return out


def load_heat_map(records: Sequence[Record]) -> Picture:
    """Share of the routed rows of every expert over time, against the uniform share, one panel a layer."""
    loads = expert_loads(records)
    steps = series(records, "step")[0]
    layers, experts = loads.shape[1:]
    ratio = _columns(steps, loads) * experts
    with np.errstate(divide="ignore"):  # a dead expert is -inf, the deepest blue
        log_ratio = np.log2(ratio)
    spread = np.abs(log_ratio[np.isfinite(log_ratio)])
    limit = float(np.clip(np.ceil(np.percentile(spread, 98)), 1, 4)) if len(spread) else 1.0
    start = max(0.0, steps[0] - (steps[-1] - steps[0]) / max(len(steps) - 1, 1))  # a line covers the steps before it
    start = min(start, steps[-1] - 1)

    fig, axes = _grid(layers, min(1.9, 0.75 + 0.06 * experts) if layers <= 16 else 0.95, right=0.85)
    for i, ax in enumerate(axes):
        image = np.clip(log_ratio[:, i].T, -limit, limit)
        ax.imshow(image, cmap=_BALANCE, vmin=-limit, vmax=limit, aspect="auto", interpolation="none",
                  extent=(start, steps[-1], experts - 0.5, -0.5))  # fmt: skip
        ax.set_title(f"layer {_layer_name(records, i)}", loc="left", pad=3)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, prune="upper"))
        ax.xaxis.set_major_formatter(FuncFormatter(compact))
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    _label_grid(fig, "step", "expert")
    _color_bar(fig, limit)
    reading = (
        "Rows are experts: orange ones get more than the uniform share 1/E of the tokens, blue ones less, and the "
        "colour of the page is balance."
    )
    return render(fig, "expert_load", "Expert load over time", reading)


def _label_grid(fig: Figure, x: str, y: str) -> None:
    height = fig.get_size_inches()[1]
    fig.text(0.5, 0.08 / height, x, ha="center", va="bottom", color=COLORS["muted"])
    fig.text(0.06 / WIDE, 0.5, y, ha="left", va="center", rotation=90, color=COLORS["muted"])


def _color_bar(fig: Figure, limit: float) -> None:
    """The legend of the heat map, in times the uniform share, at the right edge."""
    height = fig.get_size_inches()[1]
    tall = min(2.4, height - 0.75)
    ax = fig.add_axes((1 - 0.66 / WIDE, 1 - (0.30 + tall) / height, 0.14 / WIDE, tall / height))
    ax.imshow(np.linspace(1, -1, 128)[:, None], cmap=_BALANCE, aspect="auto", extent=(0, 1, -limit, limit))
    ax.set_xticks([])
    ticks = np.arange(-limit, limit + 1)
    ax.set_yticks(ticks, [f"{2.0**t:g}\u00d7" if t >= 0 else f"1/{2.0**-t:g}\u00d7" for t in ticks])
    ax.yaxis.tick_right()
    ax.tick_params(length=0)


def final_load(record: Record) -> Picture:
    """Share of every expert in the last log line, one panel a layer."""
    loads = expert_loads([record])[0]
    layers, experts = loads.shape
    fig, axes = _grid(layers, height=1.2 if layers <= 16 else 0.8)
    top = np.nanmax(loads, initial=1 / experts) * 1.08
    for i, ax in enumerate(axes):
        if experts <= 32:
            ax.bar(np.arange(experts), loads[i], width=0.78, color=COLORS["blue"], alpha=0.75)
        else:  # one outline instead of hundreds of bars
            ax.stairs(loads[i], np.arange(experts + 1) - 0.5, fill=True, color=COLORS["blue"], alpha=0.75)
        ax.axhline(1 / experts, color=COLORS["orange"], linewidth=1.3, linestyle="--")
        ax.set_title(f"layer {_layer_name([record], i)}", loc="left", pad=3)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_xlim(-0.6, experts - 0.4)
        ax.set_ylim(0, top)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(3))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g}%"))
    _label_grid(fig, "expert", "")
    reading = f"Share of the routed rows in the last log line; the dashed line is the uniform share, 1/{experts}."
    return render(fig, "final_load", "Final load per expert", reading)


def _layer_name(records: Sequence[Record], i: int) -> Any:
    """The model's index of the i-th mixture-of-experts layer."""
    names = records[-1].get("moe_layers") or []
    return names[i] if i < len(names) else i


def per_layer(records: Sequence[Record], key: str, layers: int) -> Array:
    """`key`, one number a layer in each line, as float [N, layers]; NaN where it is missing."""
    rows = [record.get(key) or [] for record in records]
    return np.array([row if len(row) == layers else [None] * layers for row in rows], dtype=float)


def _layer_lines(records: Sequence[Record], key: str) -> tuple[Figure, Axes]:
    """One line a layer over time, coloured by depth."""
    layers = len(records[-1]["expert_load"])
    steps, values = series(records, "step")[0], per_layer(records, key, layers)
    fig = new_figure()
    ax = fig.add_subplot()
    dress(ax, steps.max())
    for i in range(layers):
        color = _DEPTH(i / max(layers - 1, 1))
        # Above a few layers the legend names the ends of the range only.
        named = layers <= 6 or i in (0, layers // 2, layers - 1)
        label = f"layer {_layer_name(records, i)}" if named else ""
        marker = "o" if len(steps) < 8 else ""
        ax.plot(steps, values[:, i], color=color, linewidth=1.4 if layers <= 12 else 0.9, marker=marker, markersize=4,
                alpha=0.9, label=label)  # fmt: skip
    return fig, ax


def _legend_beside(fig: Figure) -> None:
    fig.legend(loc="outside right center", fontsize=9, handlelength=1.4)


def _ratio_ticks(low: float, high: float) -> list[float]:
    """Round ratios from `low` to `high`, far enough apart on a logarithmic axis to be read."""
    ticks: list[float] = []
    for tick in _RATIO_TICKS:
        if low <= tick <= high and (not ticks or tick / ticks[-1] >= (high / low) ** 0.12):
            ticks.append(tick)
    return ticks


def load_imbalance(records: Sequence[Record]) -> Picture:
    """Load of the busiest expert over the mean load, per layer over time."""
    fig, ax = _layer_lines(records, "max_over_mean")
    ax.axhline(1.0, color=COLORS["muted"], linewidth=1.3, linestyle="--", label="balance")
    # Logarithmic: the imbalance of the first steps is many times what a trained router shows.
    ax.set_yscale("log")
    ax.set_yticks(_ratio_ticks(*ax.get_ylim()))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(compact))
    ax.set_ylabel("max / mean load")
    _legend_beside(fig)
    reading = (
        "The busiest expert's load over the mean: 1 is balance, E/K the worst a router can do; high lines slow a step."
    )
    return render(fig, "load_imbalance", "Load imbalance per layer", reading)


def router_entropy(records: Sequence[Record]) -> Picture:
    """Entropy of the routers' distributions, per layer over time, with that of the uniform one."""
    experts = len(records[-1]["expert_load"][0])
    fig, ax = _layer_lines(records, "router_entropy")
    ax.axhline(math.log(experts), color=COLORS["muted"], linewidth=1.3, linestyle="--", label=f"ln {experts}, uniform")
    ax.set_ylabel("nats")
    _legend_beside(fig)
    reading = "How undecided the routers are: at the dashed line every expert is equally likely, at 0 one is certain."
    return render(fig, "router_entropy", "Router entropy per layer", reading)


def aux_loss_curve(records: Sequence[Record]) -> Picture:
    return _router_loss(
        records, "aux_loss", "Load-balancing loss",
        "Mean over layers before its coefficient: 1.0 is perfect balance, E/K every token on the same experts.", 1.0,
    )  # fmt: skip


def z_loss_curve(records: Sequence[Record]) -> Picture:
    return _router_loss(
        records, "z_loss", "Router z-loss",
        "Mean squared log-sum-exp of the router logits: steady growth means logits that drift towards overflow.", None,
    )  # fmt: skip


def _router_loss(records: Sequence[Record], key: str, title: str, reading: str, ideal: float | None) -> Picture:
    fig, ax = curve(records, key, "unweighted", "blue")
    if ideal is not None:
        ax.axhline(ideal, color=COLORS["muted"], linewidth=1.3, linestyle="--", label="perfect balance")
    finish(ax)
    return render(fig, key, title, reading)
