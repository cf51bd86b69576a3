"""Pictures of the experts: how evenly the routers spread the tokens, by layer, over time and at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    envelope,
    finish,
    new_figure,
    render,
)
from dmoe.observe.report.loads import LoadHistory, first_step

# The middle is transparent, so a balanced expert has the colour of the page in either theme.
_BLUE, _ORANGE = (0.16, 0.42, 0.92), (0.90, 0.40, 0.04)
BALANCE = LinearSegmentedColormap.from_list(
    "balance",
    [(0.0, (*_BLUE, 1.0)), (0.25, (*_BLUE, 0.6)), (0.4999, (*_BLUE, 0.0)),
     (0.5001, (*_ORANGE, 0.0)), (0.75, (*_ORANGE, 0.6)), (1.0, (*_ORANGE, 1.0))],
)  # fmt: skip
# From the first layer to the last; of middling brightness throughout, so as to show on white and on black.
DEPTH = LinearSegmentedColormap.from_list("depth", ["#2d9cdb", "#8b62e8", "#e0558f", "#ee8a2b"])
_MOST_PANELS = 12  # of bars: each costs a tenth of a second to draw
_RATIO_TICKS = (1, 1.05, 1.1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)


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


def load_heat_map(past: LoadHistory, log_ratio: Array, limit: float) -> Picture:
    """Share of the routed rows of every expert over time, against the uniform share, one panel a layer.

    `log_ratio` and `limit` as from `log_ratios`. A file only: the page has the same cells as images of its own.
    """
    layers, experts = past.load_NLE.shape[1:]
    steps, start = past.steps_N, first_step(past.steps_N)

    fig, axes = _grid(layers, min(1.9, 0.75 + 0.06 * experts) if layers <= 16 else 0.95, right=0.85)
    for i, ax in enumerate(axes):
        image = np.clip(log_ratio[:, i].T, -limit, limit)
        ax.imshow(image, cmap=BALANCE, vmin=-limit, vmax=limit, aspect="auto", interpolation="none",
                  extent=(start, steps[-1], experts - 0.5, -0.5))  # fmt: skip
        ax.set_title(f"layer {past.layers[i]}", loc="left", pad=3)
        ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, prune="upper"))
        ax.xaxis.set_major_formatter(FuncFormatter(compact))
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    _label_grid(fig, "step", "expert")
    _color_bar(fig, limit)
    reading = (
        "Rows are experts: orange ones get more than the uniform share 1/E of the tokens, blue ones less, and the "
        "colour of the page is balance."
    )
    return render(fig, "expert_load", "Expert load over time", reading, svg=False)


def _label_grid(fig: Figure, x: str, y: str) -> None:
    height = fig.get_size_inches()[1]
    fig.text(0.5, 0.08 / height, x, ha="center", va="bottom", color=COLORS["muted"])
    fig.text(0.06 / WIDE, 0.5, y, ha="left", va="center", rotation=90, color=COLORS["muted"])


def _color_bar(fig: Figure, limit: float) -> None:
    """The legend of the heat map, in times the uniform share, at the right edge."""
    height = fig.get_size_inches()[1]
    tall = min(2.4, height - 0.75)
    ax = fig.add_axes((1 - 0.66 / WIDE, 1 - (0.30 + tall) / height, 0.14 / WIDE, tall / height))
    ax.imshow(np.linspace(1, -1, 128)[:, None], cmap=BALANCE, aspect="auto", extent=(0, 1, -limit, limit))
    ax.set_xticks([])
    ticks = np.arange(-limit, limit + 1)
    ax.set_yticks(ticks, [_times(tick) for tick in ticks])
    ax.yaxis.tick_right()
    ax.tick_params(length=0)


def final_load(past: LoadHistory) -> Picture:
    """Share of every expert in the last log line: bars, one panel a layer, or for many layers a map of all."""
    loads = past.load_NLE[-1].astype(float)
    layers, experts = loads.shape
    if layers > _MOST_PANELS:
        return _final_map(past, loads)
    fig, axes = _grid(layers, height=1.2)
    top = np.nanmax(loads, initial=1 / experts) * 1.08
    for i, ax in enumerate(axes):
        if experts <= 32:
            ax.bar(np.arange(experts), loads[i], width=0.78, color=COLORS["blue"], alpha=0.75)
        else:  # one outline instead of hundreds of bars
            ax.stairs(loads[i], np.arange(experts + 1) - 0.5, fill=True, color=COLORS["blue"], alpha=0.75)
        ax.axhline(1 / experts, color=COLORS["orange"], linewidth=1.3, linestyle="--")
        ax.set_title(f"layer {past.layers[i]}", loc="left", pad=3)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_xlim(-0.6, experts - 0.4)
        ax.set_ylim(0, top)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(3))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g}%"))
    _label_grid(fig, "expert", "")
    reading = f"Share of the routed rows in the last log line; the dashed line is the uniform share, 1/{experts}."
    return render(fig, "final_load", "Final load per expert", reading)


def _final_map(past: LoadHistory, load_LE: Array) -> Picture:
    layers, experts = load_LE.shape
    with np.errstate(divide="ignore"):
        log_ratio = np.log2(load_LE * experts)
    limit = past.limit(log_ratio)
    fig = new_figure(WIDE, min(6.0, 1.2 + 0.1 * layers))
    ax = fig.add_subplot()
    image = ax.imshow(np.clip(log_ratio, -limit, limit), cmap=BALANCE, vmin=-limit, vmax=limit, aspect="auto",
                      interpolation="none")  # fmt: skip
    ax.tick_params(length=0)
    ax.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(past.layer_tick))
    ax.set_ylabel("layer")
    ax.set_xlabel("expert")
    ticks = np.arange(-limit, limit + 1)
    bar = fig.colorbar(image, ax=ax, ticks=ticks, pad=0.01, format=FuncFormatter(_times))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    reading = (
        "Share of the routed rows in the last log line, as times the uniform share: a row a layer, orange above it, "
        "blue below."
    )
    return render(fig, "final_load", "Final load per expert", reading)


def _times(log_ratio: float, _: object = None) -> str:
    return f"{2.0**log_ratio:g}\u00d7" if log_ratio >= 0 else f"1/{2.0**-log_ratio:g}\u00d7"


def per_layer(records: Sequence[Record], key: str, layers: int) -> Array:
    """`key`, one number a layer in each line, as float [N, layers]; NaN where it is missing."""
    rows = [record.get(key) or [] for record in records]
    return np.array([row if len(row) == layers else [None] * layers for row in rows], dtype=float)


def _layer_lines(past: LoadHistory, key: str) -> tuple[Figure, Axes]:
    """One line a layer over time, coloured by depth."""
    layers = len(past.layers)
    values = per_layer(past.records, key, layers)
    if key == "dropped":  # a line in which nothing was dropped does not say so
        values = np.nan_to_num(values)
    fig = new_figure()
    ax = fig.add_subplot()
    dress(ax, past.steps_N.max())
    for i in range(layers):
        color = DEPTH(i / max(layers - 1, 1))
        # Above a few layers the legend names the ends of the range only.
        named = layers <= 6 or i in (0, layers // 2, layers - 1)
        label = f"layer {past.layers[i]}" if named else ""
        marker = "o" if len(past.steps_N) < 8 else ""
        steps, kept = envelope(past.steps_N, values[:, i], buckets=max(60, 1200 // layers) if layers > 4 else 300)
        ax.plot(steps, kept, color=color, linewidth=1.4 if layers <= 12 else 0.9, marker=marker, markersize=4,
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


def load_imbalance(past: LoadHistory) -> Picture:
    """Load of the busiest expert over the mean load, per layer over time."""
    fig, ax = _layer_lines(past, "max_over_mean")
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


def router_entropy(past: LoadHistory) -> Picture:
    """Entropy of the routers' distributions, per layer over time, with that of the uniform one."""
    experts = past.load_NLE.shape[2]
    fig, ax = _layer_lines(past, "router_entropy")
    ax.axhline(math.log(experts), color=COLORS["muted"], linewidth=1.3, linestyle="--", label=f"ln {experts}, uniform")
    ax.set_ylabel("nats")
    _legend_beside(fig)
    reading = "How undecided the routers are: at the dashed line every expert is equally likely, at 0 one is certain."
    return render(fig, "router_entropy", "Router entropy per layer", reading)


def router_confidence(past: LoadHistory) -> Picture:
    """Mean of the largest normalised score of a token, per layer over time."""
    fig, ax = _layer_lines(past, "router_confidence")
    ax.axhline(1 / past.load_NLE.shape[2], color=COLORS["muted"], linewidth=1.3, linestyle="--", label="uniform")
    ax.set_ylabel("largest score")
    _legend_beside(fig)
    reading = (
        "The score of a token's first choice, as a share of its scores over all experts, mean over tokens: 1 is a "
        "router that is sure, the dashed line one that does not care."
    )
    return render(fig, "router_confidence", "Router confidence per layer", reading)


def dropped_tokens(past: LoadHistory) -> Picture:
    """Share of the picks that went to no expert, per layer over time."""
    fig, ax = _layer_lines(past, "dropped")
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.3g}%"))
    ax.set_ylabel("of the picks")
    _legend_beside(fig)
    reading = "Picks that no expert computed because their expert was full; 0 for a dropless layer."
    return render(fig, "dropped", "Dropped tokens per layer", reading)


def dead_experts(past: LoadHistory, dead: Array) -> Picture:
    """Number of dead experts per layer over time; `dead` as from `loads.dead_windows`."""
    steps = past.steps_N[past.window - 1 :]
    count, last = dead.sum(axis=2).astype(float), steps[-1]
    buckets = np.unique(np.searchsorted(steps, np.linspace(steps[0], last, min(len(steps), 240) + 1)[:-1]))
    columns = np.maximum.reduceat(count, buckets, axis=0)  # the most of a column, so that no short time is lost
    # Columns may be of unequal width where the lines are.
    edges = np.append(steps[buckets], last + max(1.0, (last - steps[0]) / len(columns)))
    fig = new_figure()
    ax = fig.add_subplot()
    dress(ax, last)
    ax.grid(False)
    most = max(1.0, columns.max())
    # An SVG element a cell would be thousands: an image, whose columns are drawn where their steps are.
    row = np.clip(np.searchsorted(edges, np.linspace(edges[0], edges[-1], 480, endpoint=False), "right") - 1, 0, None)
    ax.imshow(columns[row].T, cmap=BALANCE, vmin=-most, vmax=most, aspect="auto", interpolation="none",
              extent=(edges[0], edges[-1], len(past.layers) - 0.5, -0.5))  # fmt: skip
    ax.set_xlim(0, edges[-1])
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(past.layer_tick))
    ax.set_ylabel("layer")
    ax.set_title(f"at most {columns.max():,.0f} of {past.load_NLE.shape[2]} experts of a layer", loc="left", pad=3)
    reading = (
        f"An expert is dead when it got under 1 % of the mean load over {past.window} log lines: the deeper the "
        "orange, the more of a layer's experts were; the colour of the page is none."
    )
    return render(fig, "dead_experts", "Dead experts per layer", reading)


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
