"""Pictures of memory: what a step holds over time, and a bar for each rank at its peak."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

from dmoe.observe.files import write_bytes
from dmoe.observe.memory.categories import CATEGORIES, UNACCOUNTED

_COLORS = dict(
    zip(
        (*CATEGORIES, UNACCOUNTED),
        ("#2f6be8", "#d66f0c", "#7b4fd6", "#8fb2f5", "#5b8def", "#f0a95c", "#1a9562", "#c93f92", "#17a3b8", "#d3303c",
         "#9aa5b5", "#5d6b7e", "#c8ced8"),
    )
)  # fmt: skip
_SHADES = {"forward": "#ffffff", "backward": "#eef1f6", "optimizer": "#e2e7ef"}
_MIB = 2**20
_POINTS = 200


def save_pictures(folder: Path, summary: dict[str, Any], name: str = "memory") -> None:
    """NAME.svg and NAME.png of a summary (`watch.MemoryWatch`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    areas = max(summary["ranks"], key=lambda r: r["peak_bytes"])
    has_curve = bool(areas.get("areas"))
    figure = Figure(figsize=(10, 6.4 if has_curve else 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if has_curve else 1, 1, squeeze=False)[:, 0]
    if has_curve:
        _draw_step(axes[0], areas)
        axes[0].set_title(f"memory in step {summary['step']} of rank {areas['rank']}", loc="left", fontsize=10)
    draw_bars(axes[-1], summary)
    # In the order of the stacks, from the top.
    handles = {label: h for a in axes for h, label in zip(*a.get_legend_handles_labels())}
    order = [c for c in reversed((*CATEGORIES, UNACCOUNTED)) if c in handles]
    figure.legend([handles[c] for c in order], order, loc="outside right upper", frameon=False, fontsize=9)
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=110)
        write_bytes(folder / f"{name}.{kind}", buffer.getvalue())


def _draw_step(axes: Any, rank: dict[str, Any]) -> None:
    """Stacked areas over the seconds of a step, phases shaded."""
    points = _thinned([size for _, size in rank["curve"]])
    seconds = [1e3 * rank["curve"][i][0] for i in points]
    areas = {c: [sizes[i] for i in points] for c, sizes in rank["areas"].items()}
    names = [c for c in CATEGORIES if c in areas]
    axes.stackplot(
        seconds, [[n / _MIB for n in areas[c]] for c in names], labels=names, colors=[_COLORS[c] for c in names],
        step="post", linewidth=0,
    )  # fmt: skip
    starts = [(1e3 * s, phase) for s, phase in rank["phase_starts"]]
    top = max(n for _, n in rank["curve"]) / _MIB * 1.12
    wide = (seconds[-1] or 1) / 12
    for (start, phase), end in zip(starts, [s for s, _ in starts[1:]] + [seconds[-1]]):
        axes.axvspan(start, end, color=_SHADES[phase], zorder=-1, linewidth=0)
        if end - start > wide:
            axes.text((start + end) / 2, top * 0.985, phase, ha="center", va="top", fontsize=9, color="#667184")
    axes.set(xlabel="ms (accounting makes the step slower)", ylabel="MiB", xlim=(0, seconds[-1] or 1), ylim=(0, top))
    _plain(axes)


def _thinned(sizes: list[int]) -> list[int]:
    """Indices of the largest of each stretch: a vector picture of all points would be large."""
    edges = [len(sizes) * i // _POINTS for i in range(_POINTS + 1)]
    return [max(range(a, b), key=sizes.__getitem__) for a, b in pairwise(edges) if b > a]


def draw_bars(axes: Any, summary: dict[str, Any]) -> None:
    """A stacked bar for each rank at its peak, and beside it the estimate."""
    ranks = summary["ranks"]
    estimated = [r for r in ranks if r.get("estimate")]
    width = 0.4 if estimated else 0.6
    places = [i - width / 2 if estimated else i for i in range(len(ranks))]
    _stack(axes, places, [r["categories"] for r in ranks], width)
    beside = [i + width / 2 for i, r in enumerate(ranks) if r.get("estimate")]
    _stack(axes, beside, [r["estimate"] for r in estimated], width, hatch="///", alpha=0.55)
    title = "at the peak of each rank" + (", and hatched the estimate of a dry run" if estimated else "")
    axes.set_title(title, loc="left", fontsize=10)
    labels = [r.get("label", f"rank {r['rank']}") for r in ranks]
    axes.set_xticks(range(len(ranks)), labels if len(ranks) <= 16 else [str(r["rank"]) for r in ranks])
    axes.set(ylabel="MiB", xlim=(-0.6, max(len(ranks), 3) - 0.4))
    _plain(axes)


def _stack(axes: Any, places: list[float], sizes: list[dict[str, int]], width: float, **style: Any) -> None:
    bottom = [0.0] * len(places)
    for category in (*CATEGORIES, UNACCOUNTED):
        heights = [s.get(category, 0) / _MIB for s in sizes]
        if any(heights):
            color, label = _COLORS[category], None if style else category
            axes.bar(places, heights, width, bottom=bottom, color=color, label=label, edgecolor="white", **style)
            bottom = [b + h for b, h in zip(bottom, heights)]
    for place, height in zip(places, bottom):
        if len(places) <= 8:
            axes.annotate(f"{height:,.0f}", (place, height), ha="center", va="bottom", fontsize=9, color="#1f2733")


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dfe3ea", linewidth=0.6)
    axes.set_axisbelow(True)
