"""One quantity of two runs in one picture."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.ticker import FuncFormatter, MaxNLocator

from dmoe.observe.plots import COLORS, Array, Picture, compact, dress, envelope, new_figure, render, smooth

Points = tuple[Array, Array]


def overlay(
    name: str,
    title: str,
    reading: str,
    x_label: str,
    y_label: str,
    points: Sequence[Points],
    labels: Sequence[str],
) -> tuple[Picture, list[Points]]:
    """The picture, and the points of each curve in it: the running median where there are enough, without NaN.

    The range of y is that of the medians, from the end of the first twentieth of each run, so that the steep start
    does not hide the difference.
    """
    fig = new_figure()
    ax = fig.add_subplot()
    dress(ax, max((x.max(initial=0) for x, _ in points), default=1))
    ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(compact))
    drawn = []
    for (x, y), label, color in zip(points, labels, ("blue", "orange")):
        enough = len(y) >= 8
        if enough:
            ax.plot(*envelope(x, y), color=COLORS[color], alpha=0.25, linewidth=0.8)
        curve = envelope(x, smooth(y) if enough else y)
        # A $ in the name of a folder is no formula.
        ax.plot(*curve, color=COLORS[color], linewidth=1.7, marker="" if enough else "o", markersize=4,
                label=label.replace("$", r"\$"))  # fmt: skip
        drawn.append(curve)
    settled = [y[len(y) // 20 :] for _, y in drawn if len(y) >= 8]
    if settled:
        low, high = min(y.min() for y in settled), max(y.max() for y in settled)
        room = max(0.08 * (high - low), 1e-3 * abs(high), 1e-9)
        ax.set_ylim(low - room, high + room)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.legend(loc="best", fontsize=9, handlelength=1.6)
    return render(fig, name, title, reading), drawn
