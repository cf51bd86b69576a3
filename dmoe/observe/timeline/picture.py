"""The timeline as a picture: a lane for each rank in typical steps, and where a mean step goes on each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dmoe.observe.timeline.parts import OTHER
from dmoe.observe.timeline.summary import RankFile, common_steps

# Chosen to differ in lightness too, for those who see fewer colours.
COLORS = {
    "data": "#7a5230",
    "forward": "#7fb2e5",
    "backward": "#2f5fb3",
    "routing": "#f2b134",
    "exchange": "#d3303c",
    "experts": "#1a9562",
    "sync": "#3d4657",
    "optimizer": "#8e5bb5",
    OTHER: "#b8bec9",
}
NUM_STEPS = 2
"""Steps that are shown next to each other."""
MAX_LANES = 16
_INK, _MUTED = "#1f2733", "#667184"
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "timeline",  # the same summary gives the same bytes
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": "#dfe3ea",
    "axes.labelcolor": _MUTED,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}
_WAIT: Any = {"facecolor": "#ffffff", "alpha": 0.62, "edgecolor": "none", "linewidth": 0}


def draw_timeline(folder: Path, summary: dict[str, Any], files: list[RankFile]) -> None:
    """Write `timeline.svg` and `timeline.png` into `folder`.

    Args:
        summary, files: see `dmoe.observe.timeline.summary`.
    """
    lanes = _lanes(summary, files)
    height = 0.34 * len(lanes)
    with matplotlib.rc_context(_STYLE):
        fig = Figure(figsize=(12, 2.6 + 2 * height), layout="constrained")
        FigureCanvasAgg(fig)
        above, below = fig.subplots(2, 1)
        steps = _draw_lanes(above, lanes)
        _draw_means(below, summary, lanes)
        shown = [name for name in COLORS if name in summary["regions"]]
        handles = [Patch(color=COLORS[name], label=name) for name in shown]
        if any(summary["waiting"]):
            handles.append(Patch(facecolor="#dfe3ea", label="pale: waiting for other ranks"))
        fig.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, handlelength=1)
        fig.suptitle(_title(summary), x=0.01, ha="left", fontsize=11, fontweight="bold")
        above.set_title(f"Steps {' and '.join(map(str, steps))}", loc="left", fontsize=9, color=_MUTED)
        below.set_title("Mean of steps {} to {}".format(*summary["steps"]), loc="left", fontsize=9, color=_MUTED)
        for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 120})):
            temporary = folder / f".timeline.{kind}"
            fig.savefig(temporary, format=kind, facecolor="white", **options)
            os.replace(temporary, folder / f"timeline.{kind}")


def _title(summary: dict[str, Any]) -> str:
    if not summary["stragglers"]:
        return "Where the time of a step goes"
    worst = summary["stragglers"][0]
    return f"Rank {worst['rank']} keeps the others waiting: {1e3 * worst['seconds_behind']:.3g} ms in {worst['region']}"


def _lanes(summary: dict[str, Any], files: list[RankFile]) -> list[RankFile]:
    """Ranks to show: all, or stragglers and of the others some that are evenly spread."""
    if len(files) <= MAX_LANES:
        return files
    named = {s["rank"] for s in summary["stragglers"]}
    chosen = [i for i, file in enumerate(files) if file.rank in named][:MAX_LANES]
    others = [i for i in range(len(files)) if i not in chosen]
    places = np.linspace(0, len(others) - 1, MAX_LANES - len(chosen)).astype(int)
    return [files[i] for i in sorted([*chosen, *(others[p] for p in places)])]


def _typical_steps(files: list[RankFile]) -> list[int]:
    """Those nearest to the median length, of the steps that every rank kept in full."""
    kept = [step for step in common_steps(files) if all(str(step) in file.content["spans"] for file in files)]
    if not kept:
        return []
    seconds = np.max([file.seconds(kept) for file in files], axis=0)
    nearest = np.argsort(np.abs(seconds - np.median(seconds)), kind="stable")[:NUM_STEPS]
    return sorted(kept[i] for i in nearest)


def _draw_lanes(axes: Axes, files: list[RankFile]) -> list[int]:
    """A lane a rank, each from the begin of its own step: a step begins as all leave a collective of the one before."""
    steps, offset = _typical_steps(files), 0.0
    for step in steps:
        longest = 0.0
        for lane, file in enumerate(files):
            spans = file.content["spans"][str(step)]
            for region, waits, start, end in spans:
                bar = [(1e3 * (offset + start), 1e3 * (end - start))]
                axes.broken_barh(bar, (lane - 0.4, 0.8), facecolor=COLORS.get(region, COLORS[OTHER]), linewidth=0)
                if waits:
                    axes.broken_barh(bar, (lane - 0.4, 0.8), **_WAIT)
            longest = max(longest, spans[-1][3])
        offset += longest * 1.03
    _label_ranks(axes, files)
    return steps


def _draw_means(axes: Axes, summary: dict[str, Any], files: list[RankFile]) -> None:
    places = [summary["rank_ids"].index(file.rank) for file in files]
    lanes, left = np.arange(len(files)), np.zeros(len(files))
    for name in [n for n in COLORS if n in summary["regions"]]:
        whole, waits = (1e3 * np.array(summary[kind][name])[places] for kind in ("regions", "waiting_in"))
        axes.barh(lanes, whole, left=left, color=COLORS[name], height=0.8, linewidth=0)
        axes.barh(lanes, waits, left=left + whole - waits, height=0.8, **_WAIT)
        left = left + whole
    _label_ranks(axes, files)


def _label_ranks(axes: Axes, files: list[RankFile]) -> None:
    axes.set_yticks(range(len(files)), [f"rank {file.rank}" for file in files])
    axes.set_ylim(len(files) - 0.4, -0.6)
    axes.margins(x=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
