"""Pictures of the routing of a fixed piece of text: how sure the routers are, and how their picks move."""

from __future__ import annotations

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dmoe.observe.expert_plots import BALANCE, DEPTH
from dmoe.observe.plots import COLORS, Array, Picture, dress, new_figure, render
from dmoe.observe.report.routing import Routing


def confidence(routing: Routing) -> Picture:
    """Histogram of the tokens by their largest probability, a row a layer."""
    share_LB, layers = routing.last.confidence_hist_LB, routing.layers
    fig = new_figure()
    ax = fig.add_subplot()
    most = float(share_LB.max(initial=0.01))
    ax.imshow(share_LB, cmap=BALANCE, vmin=-most, vmax=most, aspect="auto", interpolation="none",
              extent=(0, 1, len(layers) - 0.5, -0.5))  # fmt: skip
    mean = routing.last.confidence_L
    ax.plot(
        mean, np.arange(len(layers)), "|" if len(layers) > 1 else "o", color=COLORS["ink"], markersize=6, label="mean"
    )
    ax.axvline(1 / routing.last.num_experts, color=COLORS["muted"], linewidth=1.2, linestyle="--", label="uniform")
    ax.set_xlim(0, 1)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda i, _: str(layers[int(i)]) if 0 <= i < len(layers) else ""))
    ax.tick_params(length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel("largest probability of a token")
    ax.set_ylabel("layer")
    fig.legend(loc="outside right upper", fontsize=9, handlelength=1.4)
    reading = (
        f"Each row is a layer's tokens by the probability of their first choice; the deepest orange is {most:.0%} of "
        "the tokens. Far right: sure routers."
    )
    return render(fig, "confidence", f"Confidence of the routers at step {routing.last.step:,}", reading)


def drift_next(routing: Routing) -> Picture:
    reading = "Share of a token's experts that are still the same at the next kept step: near 1, routing has settled."
    return _drift(routing, routing.equal_next_SL, "drift_next", "Picks kept until the next validation", reading)


def drift_last(routing: Routing) -> Picture:
    reading = "Share of a token's experts that are those of the last kept step: how early the final routing was there."
    return _drift(routing, routing.equal_last_SL, "drift_last", "Picks in common with the last validation", reading)


def _drift(routing: Routing, equal_SL: Array, name: str, title: str, reading: str) -> Picture:
    fig = new_figure()
    ax = fig.add_subplot()
    steps, layers = np.array(routing.steps_S[:-1], dtype=float), routing.layers
    dress(ax, steps.max(initial=0))
    for i, layer in enumerate(layers):
        named = len(layers) <= 6 or i in (0, len(layers) // 2, len(layers) - 1)
        color, marker = DEPTH(i / max(len(layers) - 1, 1)), "o" if len(steps) < 8 else ""
        ax.plot(steps, equal_SL[:, i], color=color, linewidth=1.2, alpha=0.9, marker=marker, markersize=4,
                label=f"layer {layer}" if named else "")  # fmt: skip
    chance = routing.last.top_k / routing.last.num_experts
    ax.axhline(chance, color=COLORS["muted"], linewidth=1.2, linestyle="--", label="by chance")
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("of the picks")
    fig.legend(loc="outside right center", fontsize=9, handlelength=1.4)
    return render(fig, name, title, reading)
