"""Pictures of a training run: how a figure becomes a `Picture`, and the curves over steps.

A picture is drawn once and kept twice: as an SVG whose colours are CSS variables, so that the page can restyle it for
a light or a dark theme, and as a PNG on white with its title in it, for slides and messages.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Record = dict[str, Any]
Array = np.ndarray[Any, np.dtype[np.float64]]

# The light theme's colours. In the SVG each becomes var(--plot-NAME); report.css defines both themes.
COLORS = {
    "ink": "#1f2733",
    "muted": "#667184",
    "grid": "#dfe3ea",
    "blue": "#2f6be8",
    "orange": "#d66f0c",
    "green": "#1a9562",
    "red": "#d3303c",
    "purple": "#7b4fd6",
    "cyan": "#1793a8",
    "pink": "#c93f92",
    "brown": "#8a6a3c",
}
NARROW, WIDE = 6.2, 12.9  # inches: half of the page, all of it
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font and colour
    "font.size": 9.5,
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["muted"],
    "axes.edgecolor": COLORS["grid"],
    "axes.titlesize": 9.5,
    "axes.titlecolor": COLORS["muted"],
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "grid.color": COLORS["grid"],
    "legend.frameon": False,
    "path.simplify_threshold": 0.5,
}
_DRAW_PNG: ContextVar[bool] = ContextVar("draw_png", default=True)
_BUCKETS = 300  # of a curve: its smallest and its largest value in each are kept


@dataclass(frozen=True)
class Picture:
    """One figure, ready for the page and for plots/`name`.png. `reading` is the sentence that says how to read it.

    `svg` is empty for a picture that only becomes a file, `png` where `style` was told to leave the files out.
    """

    name: str
    title: str
    reading: str
    svg: str
    png: bytes
    wide: bool


@contextlib.contextmanager
def style(png: bool = True) -> Iterator[None]:
    """Context in which figures are made and rendered; without `png` their PNG form, half the work, is left out."""
    token = _DRAW_PNG.set(png)
    try:
        with matplotlib.rc_context(_STYLE):
            yield
    finally:
        _DRAW_PNG.reset(token)


def render(fig: Figure, name: str, title: str, reading: str, svg: bool = True) -> Picture:
    """Render `fig` to both forms, or without `svg` to the file alone."""
    FigureCanvasAgg(fig)
    text = _svg(fig, name, title) if svg else ""
    png = _png(fig, title) if _DRAW_PNG.get() else b""
    return Picture(name, title, reading, text, png, bool(fig.get_size_inches()[0] >= WIDE))


def _svg(fig: Figure, name: str, title: str) -> str:
    raw = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same run gives the same bytes
        fig.savefig(raw, format="svg", transparent=True, metadata={"Date": None})
    return _inline(raw.getvalue().decode(), name, title)


def _png(fig: Figure, title: str) -> bytes:
    width, height = fig.get_size_inches()
    # Room for the title above what is drawn, so that it fits whatever the layout of the figure.
    fig.text(0.012, 1 + 0.12 / height, title, fontsize=11.5, fontweight="bold", va="bottom", color=COLORS["ink"])
    png = io.BytesIO()
    dpi = 130 if width < WIDE else 110
    fig.savefig(png, format="png", dpi=dpi, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    return png.getvalue()


def _inline(svg: str, name: str, title: str) -> str:
    """Make matplotlib's SVG document fit to stand inside an HTML page beside others."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style .*?</style>", "", svg, flags=re.DOTALL)  # would apply to the whole page
    svg = re.sub(r"\sxmlns(:\w+)?=\"[^\"]*\"", "", svg)  # HTML knows SVG without its namespace
    label = html.escape(title)
    svg = re.sub(r"<svg ([^>]*?)>", lambda m: f'<svg {_frame(m[1])} role="img" aria-label="{label}">', svg, count=1)
    # A hundredth of a point is finer than any screen, and six decimals are half of the page.
    svg = re.sub(r'\sd="[^"]*"', lambda m: re.sub(r"-?\d+\.\d{3,}", _hundredths, m[0]), svg)
    # One page holds many figures, and each numbers its parts from 1: keep the ids that are referred to, with a prefix.
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'url\(#|xlink:href="#', lambda m: m[0] + name + "-", svg)
    for color, value in COLORS.items():
        svg = svg.replace(value, f"var(--plot-{color})")
    return svg


def _hundredths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")


def _frame(attributes: str) -> str:
    """Attributes of the outer element without its size: the page sets the width, the viewBox the shape."""
    return re.sub(r'\b(width|height|version)="[^"]*"\s*', "", attributes).strip()


def compact(value: float, _: object = None) -> str:
    """A number for a tick: 1500 -> 1.5k."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def new_figure(width: float = NARROW, height: float = 2.7) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def dress(ax: Axes, last_step: float) -> None:
    """The look of a curve over steps: no box, a faint grid, steps from 0."""
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="y", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    ax.set_xlim(0, max(last_step, 1) * 1.01)
    ax.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(compact))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(compact))
    ax.set_xlabel("step")


def series(records: Sequence[Record], key: str, scale: float = 1.0) -> tuple[Array, Array]:
    """Steps and values of `key`, both float [N]; a value that is missing or not finite is NaN."""
    steps = np.array([record["step"] for record in records], dtype=float)
    values = np.array([record.get(key) for record in records], dtype=float) * scale
    values[~np.isfinite(values)] = np.nan
    return steps, values


def envelope(steps: Array, values: Array, buckets: int = _BUCKETS) -> tuple[Array, Array]:
    """The points of a curve, `steps` and `values` [N], that show it as well as all: at most two for each of `buckets`
    equal spans of steps, its smallest and its largest value, so that no spike is lost. Values are NaN where a whole
    span is; the first and the last point always stay."""
    if len(steps) <= 2 * buckets:
        return steps, values
    edges = np.linspace(steps[0], steps[-1], buckets + 1)[1:-1]
    keep = {0, len(steps) - 1}
    starts = np.concatenate([[0], np.searchsorted(steps, edges), [len(steps)]])
    for start, stop in pairwise(starts):
        part = values[start:stop]
        if np.isfinite(part).any():
            keep |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
        elif len(part):
            keep.add(int(start))
    kept = sorted(keep)
    return steps[kept], values[kept]


def thin(steps: Array, buckets: int = _BUCKETS) -> Array:
    """Of marks at `steps` [N], one for each of `buckets` equal spans, for more cannot be told apart."""
    if len(steps) <= buckets:
        return steps
    span = np.linspace(steps[0], steps[-1], buckets + 1)[:-1]
    return steps[np.unique(np.searchsorted(steps, span))]


def smooth(values: Array) -> Array:
    """Running median over about a twentieth of the points, centred, narrower at the ends; NaN stays NaN.

    A median, because one slow step or one spike of the loss should not bend the curve around it.
    """
    finite = values[np.isfinite(values)]
    half = min(max(len(finite) // 40, 2), 50)
    middle = finite.copy()
    if len(finite) > 2 * half:
        middle[half:-half] = np.median(np.lib.stride_tricks.sliding_window_view(finite, 2 * half + 1), axis=1)
    for i in range(1, min(half, (len(finite) + 1) // 2)):
        middle[i] = np.median(finite[: 2 * i + 1])
        middle[-1 - i] = np.median(finite[-2 * i - 1 :])
    out = np.full_like(values, np.nan)
    out[np.isfinite(values)] = middle
    return out


def _line(ax: Axes, steps: Array, values: Array, color: str, label: str, smoothed: bool) -> None:
    """One curve: the values, faint beneath their running median if there are enough of them."""
    enough = np.isfinite(values).sum() >= 8
    marker = "" if enough else "o"
    if smoothed and enough:
        ax.plot(*envelope(steps, values), color=COLORS[color], alpha=0.3, linewidth=0.8)
        values = smooth(values)
    ax.plot(*envelope(steps, values), color=COLORS[color], linewidth=1.7, marker=marker, markersize=4.5, label=label)


def _limit_spikes(ax: Axes, steps: Array, values: Array, beside: Array | None = None) -> None:
    """Keep a few huge values from flattening the curve: they become arrows at the upper edge.

    `beside`: values of another curve in the same axes, all of which stay in view.
    """
    finite = values[np.isfinite(values)]
    if len(finite) < 20:
        return
    low, high = finite.min(), np.percentile(finite, 97)
    ceiling = high + 0.5 * (high - min(low, 0))
    if beside is not None:
        low, ceiling = np.nanmin(beside, initial=low), np.nanmax(beside, initial=ceiling)
    above = steps[np.nan_to_num(values) > ceiling]
    if len(above):
        ax.set_ylim(low - 0.05 * (ceiling - low), ceiling)
        marks = thin(above)
        ax.plot(marks, np.full(len(marks), ceiling), "^", color=COLORS["red"], markersize=5, clip_on=False,
                label=f"{len(above)} off the scale")  # fmt: skip


def finish(ax: Axes, empty: str = "no finite values yet") -> None:
    """Legend if there is something to tell apart; a note if there is nothing to see."""
    curves = [line for line in ax.lines if np.isfinite(np.asarray(line.get_ydata(), dtype=float)).any()]
    if not curves:
        ax.set_yticks([])
        ax.text(0.5, 0.5, empty, transform=ax.transAxes, ha="center", va="center", color=COLORS["muted"])
    labels = ax.get_legend_handles_labels()[1]
    if len(labels) > 1:
        ax.legend(loc="best", fontsize=9, handlelength=1.6)


def curve(train: Sequence[Record], key: str, unit: str, color: str, smoothed: bool = True) -> tuple[Figure, Axes]:
    """A figure with one quantity of the train lines."""
    fig = new_figure()
    ax = fig.add_subplot()
    steps, values = series(train, key)
    dress(ax, steps.max(initial=0))
    _line(ax, steps, values, color, unit, smoothed)
    ax.set_ylabel(unit)
    return fig, ax


def loss_curve(train: Sequence[Record], evals: Sequence[Record], events: Sequence[Record]) -> Picture:
    """Training and validation loss, with the steps of events and of losses that were not finite."""
    fig = new_figure()
    ax = fig.add_subplot()
    steps, values = series(train, "loss")
    eval_steps, eval_values = series(evals, "loss")
    dress(ax, max(steps.max(initial=0), eval_steps.max(initial=0)))
    _line(ax, steps, values, "blue", "training", smoothed=True)
    if len(evals):
        ax.plot(
            eval_steps, eval_values, color=COLORS["orange"], linewidth=1.7, marker="o", markersize=4, label="validation"
        )
    _limit_spikes(ax, steps, values, beside=eval_values)
    bad = thin(steps[np.isnan(values)])
    if len(bad):
        edge = np.zeros(len(bad))
        ax.plot(bad, edge, "x", color=COLORS["red"], transform=ax.get_xaxis_transform(), clip_on=False, markersize=5,
                label="not finite")  # fmt: skip
    for i, step in enumerate(thin(np.unique([float(event["step"]) for event in events]))):
        ax.axvline(step, color=COLORS["muted"], linewidth=0.9, linestyle=":", label="" if i else "event")
    ax.set_ylabel("nats per token")
    finish(ax)
    reading = (
        "Cross-entropy, lower is better: faint is each log line, solid their running median; "
        "validation rising away from training means memorising."
    )
    return render(fig, "loss", "Loss", reading)


def bits_per_byte_curve(evals: Sequence[Record]) -> Picture:
    """Validation bits per byte against what zlib -9 makes of the same text."""
    fig = new_figure()
    ax = fig.add_subplot()
    steps, values = series(evals, "bits_per_byte")
    dress(ax, steps.max(initial=0))
    ax.plot(steps, values, color=COLORS["orange"], linewidth=1.7, marker="o", markersize=4, label="model")
    whole = np.array([bool(record.get("whole")) for record in evals], dtype=bool)
    if whole.any():
        ax.plot(steps[whole], values[whole], "o", markersize=10, markerfacecolor="none", label="whole held-out text",
                color=COLORS["orange"], clip_on=False)  # fmt: skip
    zlib = series(evals, "zlib_bits_per_byte")[1]
    if np.isfinite(zlib).any():
        ax.axhline(zlib[np.isfinite(zlib)][-1], color=COLORS["green"], linewidth=1.4, linestyle="--", label="zlib -9")
    ax.set_ylabel("bits per byte")
    finish(ax, "no validation yet")
    reading = "Bits the model needs for a byte of unseen text; below the dashed line it compresses better than zlib -9."
    return render(fig, "bits_per_byte", "Validation bits per byte", reading)


def learning_rate_curve(train: Sequence[Record]) -> Picture:
    fig, ax = curve(train, "lr", "learning rate", "blue", smoothed=False)
    ax.set_ylim(bottom=0)
    finish(ax)
    reading = "The schedule as it was applied: linear warm-up, then the decay that the config names."
    return render(fig, "learning_rate", "Learning rate", reading)


def skipped_at(train: Sequence[Record]) -> Array:
    """Steps of the log lines in which the cumulative `skipped_steps` grew, float [N]."""
    steps, total = series(train, "skipped_steps")
    # A resumed process may count from 0 again, which is a fall and so not a skip.
    return steps[np.diff(np.nan_to_num(total), prepend=0.0) > 0]


def grad_norm_curve(train: Sequence[Record]) -> Picture:
    """Gradient norm before clipping, with the log lines in which steps were skipped."""
    fig, ax = curve(train, "grad_norm", "global norm", "blue")
    _limit_spikes(ax, *series(train, "grad_norm"))
    for i, step in enumerate(thin(skipped_at(train))):
        ax.axvline(step, color=COLORS["red"], linewidth=1.1, alpha=0.8, label="" if i else "skipped steps")
    ax.set_ylim(bottom=0)
    finish(ax)
    reading = "Norm over all gradients before clipping; a red line marks steps skipped for being not finite."
    return render(fig, "grad_norm", "Gradient norm", reading)


def tokens_per_second_curve(train: Sequence[Record]) -> Picture:
    fig, ax = curve(train, "tokens_per_second", "tokens per second", "green")
    ax.set_ylim(bottom=0)
    finish(ax)
    reading = "Training speed; dips are other work on the machine, or the loader not keeping up."
    return render(fig, "tokens_per_second", "Throughput", reading)


def step_time_curve(train: Sequence[Record]) -> Picture:
    fig, ax = curve(train, "step_seconds", "seconds per step", "green")
    _limit_spikes(ax, *series(train, "step_seconds"))
    ax.set_ylim(bottom=0)
    finish(ax)
    reading = "Wall-clock time of an optimiser step; the first ones include warm-up and compilation."
    return render(fig, "step_time", "Step time", reading)
