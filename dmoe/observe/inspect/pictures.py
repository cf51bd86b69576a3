"""Pictures of an inspection: loads, routers by depth, what is picked together, how alike layers are, what moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dmoe.observe.inspect.details import Inspection
from dmoe.observe.inspect.reading import Reading
from dmoe.observe.plots import COLORS, NARROW, WIDE, Picture, new_figure, render
from dmoe.observe.routing import RoutingSummary
from dmoe.observe.routing.summary import Array

# The middle, or the low end, is transparent: it has the colour of the page in either theme.
_BLUE, _ORANGE = (0.16, 0.42, 0.92), (0.90, 0.40, 0.04)
_BOTH_SIDES = LinearSegmentedColormap.from_list(
    "both_sides",
    [(0.0, (*_BLUE, 1.0)), (0.25, (*_BLUE, 0.6)), (0.4999, (*_BLUE, 0.0)),
     (0.5001, (*_ORANGE, 0.0)), (0.75, (*_ORANGE, 0.6)), (1.0, (*_ORANGE, 1.0))],
)  # fmt: skip
_UPWARDS = LinearSegmentedColormap.from_list("upwards", [(0.0, (*_BLUE, 0.0)), (1.0, (*_BLUE, 1.0))])
_UNKNOWN = (0.5, 0.5, 0.5, 0.35)


def draw(inspection: Inspection) -> dict[str, list[Picture]]:
    """The pictures by section of the page. In the context of `dmoe.observe.plots.style`."""
    reading, other = inspection.reading, inspection.other
    summary = reading.summary
    sections = {
        "layers": [
            load_map(summary, "load", "Load of every expert", wide=True),
            entropy_by_layer(inspection),
            shares_by_layer(inspection),
            confidence_map(summary),
            likeness_map(reading),
        ],
        "together": [coactivation(inspection)] if summary.top_k > 1 and summary.num_experts > 1 else [],
    }
    if other is not None:
        limit = max(_load_limit(summary), _load_limit(other.summary))
        sections["drift"] = [
            picks_by_layer(inspection),
            divergence_by_layer(inspection),
            load_map(summary, "load_here", f"Load in {inspection.title}", limit=limit),
            load_map(other.summary, "load_there", f"Load in {inspection.other_title}", limit=limit),
        ]
    return {name: pictures for name, pictures in sections.items() if pictures}


def load_map(
    summary: RoutingSummary, name: str, title: str, *, wide: bool = False, limit: float | None = None
) -> Picture:
    """Share of the picks of every expert of every layer against the even share, up to 2 ** `limit` times of it."""
    limit = _load_limit(summary) if limit is None else limit
    ratio_LE = _log2(summary.load_LE * summary.num_experts)
    layers = len(summary.layers)
    fig = new_figure(WIDE if wide else NARROW, min(6.0, 1.1 + layers * (0.24 if wide else 0.16)))
    ax = fig.add_subplot()
    _map(fig, ax, np.clip(ratio_LE, -limit, limit), limit, _times)
    _name_layers(ax.yaxis, summary)
    ax.set_xlabel("expert")
    ax.set_ylabel("layer")
    reading = (
        "Orange experts get more than the even share of the picks, blue ones less; a dead one is the deepest blue."
    )
    return render(fig, name, title, reading)


def _load_limit(summary: RoutingSummary) -> float:
    """The end of the scale of loads, as a power of 2: few experts are beyond it."""
    ratio_LE = np.abs(_log2(summary.load_LE * summary.num_experts))
    spread = ratio_LE[np.isfinite(ratio_LE)]
    return float(np.clip(np.ceil(np.percentile(spread, 98)), 1, 4)) if len(spread) else 1.0


def confidence_map(summary: RoutingSummary) -> Picture:
    """Histogram of each layer's largest probabilities."""
    fig = new_figure()
    ax = fig.add_subplot()
    hist_LB = summary.confidence_hist_LB
    image = ax.imshow(hist_LB, cmap=_UPWARDS, vmin=0, vmax=max(hist_LB.max(initial=0), 1e-9), aspect="auto",
                      interpolation="none", extent=(0, 1, len(hist_LB) - 0.5, -0.5))  # fmt: skip
    _bare(ax)
    _name_layers(ax.yaxis, summary)
    _bar(fig, image, ax, FuncFormatter(lambda share, _: f"{share:.0%}"))
    ax.set_xlabel("largest probability of a token")
    ax.set_ylabel("layer")
    reading = "How sure each router is: tokens to the right have one expert that gets most of the probability."
    return render(fig, "confidence", "Confidence of the routers", reading)


def likeness_map(reading: Reading) -> Picture:
    """Which layers group the tokens alike."""
    fig = new_figure()
    ax = fig.add_subplot()
    cmap = _UPWARDS.with_extremes(bad=_UNKNOWN)
    image = ax.imshow(np.clip(reading.likeness_LL, 0, 1), cmap=cmap, vmin=0, vmax=1, aspect="auto",
                      interpolation="none")  # fmt: skip
    _bare(ax)
    _name_layers(ax.yaxis, reading.summary)
    _name_layers(ax.xaxis, reading.summary, room=10)
    _bar(fig, image, ax, None)
    ax.set_xlabel("layer")
    ax.set_ylabel("layer")
    text = "1: two layers send the same tokens together, whatever their experts are called; 0: no more than by chance."
    return render(fig, "likeness", "How alike layers route", text)


def entropy_by_layer(inspection: Inspection) -> Picture:
    """Entropy of the routers over depth."""
    fig, ax = _by_layer(inspection.reading.summary)
    for reading, color, label in _models(inspection):
        _depth(ax, reading.summary.layers, reading.summary.entropy_L, color, label)
    experts = inspection.reading.summary.num_experts
    ax.axhline(
        math.log(experts), color=COLORS["muted"], linewidth=1.3, linestyle="--", label=f"ln {experts}, undecided"
    )
    ax.set_ylim(bottom=0)
    ax.set_ylabel("nats")
    _legend(ax)
    text = "At the dashed line a router finds every expert equally likely, at 0 it is certain of one."
    return render(fig, "entropy", "Router entropy by layer", text)


def shares_by_layer(inspection: Inspection) -> Picture:
    """Specialisation, confidence and margin over depth."""
    fig, ax = _by_layer(inspection.reading.summary)
    for reading, _, _ in reversed(_models(inspection)):
        own = reading is inspection.reading
        for values, color, what in (
            (reading.specialization_L, "green", "specialisation"),
            (reading.summary.confidence_L, "blue", "confidence"),
            (reading.summary.margin_L, "orange", "margin"),
        ):
            _depth(ax, reading.summary.layers, values, color, what if own else "", "-" if own else ":")
    ax.set_ylim(0, 1)
    _legend(ax)
    text = (
        "Specialisation: 1 if the token alone decides its experts, 0 by chance. Confidence: the largest probability. "
        "Margin: from the last expert picked to the next one."
    )
    if inspection.other is not None:
        text += f" Dotted: {inspection.other_title}."
    return render(fig, "shares", "Specialisation, confidence and margin", text)


def coactivation(inspection: Inspection) -> Picture:
    """Lift of two experts being picked together, for the layers that are shown in detail."""
    summary = inspection.reading.summary
    experts = summary.num_experts
    at_most = 12 if experts <= 64 else 6 if experts <= 128 else 3  # bounds the size of the page
    chosen = [view.layer for view in inspection.layers]
    chosen = [chosen[round(i)] for i in np.linspace(0, len(chosen) - 1, min(at_most, len(chosen)))]
    columns = min(len(chosen), 6 if len(chosen) > 4 else 4)
    rows = math.ceil(len(chosen) / columns)
    fig = new_figure(WIDE, 0.35 + rows * min(3.2, (WIDE - 1) / columns + 0.1))
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for ax in axes[len(chosen) :]:
        ax.set_visible(False)
    limit, indices = 3.0, summary.layers.tolist()
    for ax, layer in zip(axes, chosen):
        lift_EE = _log2(summary.coactivation_lift(indices.index(layer)))
        steps = np.round(np.clip(lift_EE, -limit, limit) * 6) / 6  # few colours make small files
        image = ax.imshow(steps, cmap=_BOTH_SIDES.with_extremes(bad=_UNKNOWN), vmin=-limit, vmax=limit,
                          interpolation="none")  # fmt: skip
        _bare(ax)
        ax.set_title(f"layer {layer}", loc="left", pad=3)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4, integer=True))
    bar = fig.colorbar(image, ax=list(axes), fraction=0.02, pad=0.01, ticks=np.arange(-limit, limit + 1))
    _dress_bar(bar, FuncFormatter(_times))
    text = "Two experts in orange are picked for the same token more often than by chance, in blue less often."
    return render(fig, "coactivation", "Experts picked together", text)


def picks_by_layer(inspection: Inspection) -> Picture:
    """Equal picks of two models by layer."""
    assert inspection.moved is not None
    moved = inspection.moved
    fig, ax = _by_layer(inspection.reading.summary)
    _depth(ax, moved.layers, moved.equal_picks_L, "blue", "equal picks")
    _depth(ax, moved.layers, moved.equal_sets_L, "orange", "all picks equal")
    _depth(ax, moved.layers, moved.likeness_L, "green", "likeness")
    ax.set_ylim(0, 1.02)
    _legend(ax)
    text = (
        "Share of a token's experts that both models pick, and of tokens for which all are the same. Likeness is 1 "
        "also if experts were only renumbered."
    )
    return render(fig, "equal_picks", f"Routing against {inspection.other_title}", text)


def divergence_by_layer(inspection: Inspection) -> Picture:
    """Jensen-Shannon divergence of the loads by layer."""
    assert inspection.moved is not None
    fig, ax = _by_layer(inspection.reading.summary)
    _depth(ax, inspection.moved.layers, inspection.moved.load_divergence_L, "blue", "")
    ax.set_ylim(bottom=0)
    ax.set_ylabel("bits")
    text = "Jensen-Shannon divergence of the two loads: 0 if experts are equally busy in both, 1 if others are."
    return render(fig, "load_divergence", "How far the loads moved", text)


def _models(inspection: Inspection) -> list[tuple[Reading, str, str]]:
    models = [(inspection.reading, "blue", inspection.title)]
    return models if inspection.other is None else [*models, (inspection.other, "orange", inspection.other_title)]


def _by_layer(summary: RoutingSummary) -> tuple[Figure, Axes]:
    fig = new_figure()
    ax = fig.add_subplot()
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    first, last = summary.layers[0], summary.layers[-1]
    ax.set_xlim(first - 0.3, last + 0.3)
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    ax.set_xlabel("layer")
    return fig, ax


def _depth(ax: Axes, layers: Array, values: Array, color: str, label: str, dashes: str = "-") -> None:
    marker = "o" if len(layers) <= 32 else ""
    ax.plot(layers, values, dashes, color=COLORS[color], linewidth=1.7, marker=marker, markersize=4, label=label,
            clip_on=False)  # fmt: skip


def _legend(ax: Axes) -> None:
    labels = ax.get_legend_handles_labels()[1]
    if labels:
        # Above the axes: a curve may be anywhere inside.
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8.5, handlelength=1.4, borderaxespad=0.1)


def _map(fig: Figure, ax: Axes, values: Array, limit: float, label: Any) -> None:
    cmap = _BOTH_SIDES.with_extremes(bad=_UNKNOWN)
    image = ax.imshow(values, cmap=cmap, vmin=-limit, vmax=limit, aspect="auto", interpolation="none")
    _bare(ax)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    bar = _bar(fig, image, ax, FuncFormatter(label))
    bar.set_ticks(np.arange(-limit, limit + 1, 1 if len(values) > 4 or limit < 3 else 2))


def _bar(fig: Figure, image: Any, ax: Axes, form: FuncFormatter | None) -> Any:
    bar = fig.colorbar(image, ax=ax, fraction=0.04, pad=0.02)
    _dress_bar(bar, form)
    return bar


def _dress_bar(bar: Any, form: FuncFormatter | None) -> None:
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    if form is not None:
        bar.ax.yaxis.set_major_formatter(form)


def _bare(ax: Axes) -> None:
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_color(COLORS["grid"])


def _name_layers(axis: Any, summary: RoutingSummary, room: int = 16) -> None:
    """Ticks with the model's index of a layer, of all of them or evenly chosen ones."""
    count = len(summary.layers)
    places: Sequence[int] = range(0, count, math.ceil(count / room))
    axis.set_ticks(list(places), [str(summary.layers[i]) for i in places])


def _log2(values: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log2(values))


def _times(power: float, _: object = None) -> str:
    return f"{2.0**power:g}\u00d7" if power >= 0 else f"1/{2.0**-power:g}\u00d7"
