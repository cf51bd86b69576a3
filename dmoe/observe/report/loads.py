"""Loads of the experts over a run: as columns of time, and which experts are dead or busy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmoe.observe.report.run import Record

Array = np.ndarray[Any, np.dtype[Any]]

DEAD_BELOW = 0.01  # of the mean load of the layer's experts
_MAX_CELLS = 400_000  # of the heat maps, over all layers: bounds the size of the page


@dataclass(frozen=True)
class LoadHistory:
    """Shares of the routed rows of each expert over time.

    `steps_N` float, `load_NLE` float32 with NaN where a share is not known, `layers` the model's indices of the
    mixture-of-experts layers, `records` the train lines they come from.
    """

    steps_N: Array
    load_NLE: Array
    layers: list[Any]
    records: list[Record]

    @property
    def window(self) -> int:
        """Log lines over which an expert is judged: a twentieth of the run, at most 100."""
        return min(max(len(self.steps_N) // 20, min(len(self.steps_N), 5)), 100)

    def limit(self, log_ratio: Array) -> float:
        """Where to end a scale of base-2 logarithms of loads over the mean: at 2, 4, 8 or 16 times."""
        spread = np.abs(log_ratio[np.isfinite(log_ratio)])
        return float(np.clip(np.ceil(np.percentile(spread, 98)), 1, 4)) if len(spread) else 1.0

    def layer_tick(self, i: float, _: object = None) -> str:
        """The name of the i-th layer on an axis."""
        return str(self.layers[int(i)]) if 0 <= i < len(self.layers) else ""

    @property
    def last_LE(self) -> Array:
        """Mean shares over the last window, float64."""
        return _mean(self.load_NLE[-self.window :].astype(np.float64))


def history(train: Sequence[Record]) -> LoadHistory | None:
    """The history of a run, from the train lines of the shape that the last one has; None for a dense run."""
    records = [record for record in train if record.get("expert_load") is not None]
    if not records:
        return None
    shape = records[-1]["expert_load"].shape
    records = [record for record in records if record["expert_load"].shape == shape]
    names = records[-1].get("moe_layers") or []
    return LoadHistory(
        steps_N=np.array([record["step"] for record in records], dtype=float),
        load_NLE=np.stack([record["expert_load"] for record in records]),
        layers=list(names) if len(names) == shape[0] else list(range(shape[0])),
        records=records,
    )


def _mean(values: Array) -> Array:
    """Mean over the first axis of what is known; NaN where nothing is."""
    known = np.isfinite(values)
    count = known.sum(axis=0)
    total = np.where(known, values, 0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def time_columns(steps_N: Array, values: Array, cells: int = _MAX_CELLS) -> tuple[Array, Array]:
    """`values` [N, ...] as equal columns of time [C, ...], and the last step of each column [C].

    A column is the mean of the lines that fall into it, or a copy of the nearest line. C is at most 240, and so that
    the columns together have about `cells` values, though at least 30.
    """
    count = min(len(steps_N), 240, max(30, cells // max(int(np.prod(values.shape[1:])), 1)))
    edges = np.linspace(steps_N[0], steps_N[-1], count + 1)
    column = np.clip(np.searchsorted(edges, steps_N, side="right") - 1, 0, count - 1)
    centres = (edges[:-1] + edges[1:]) / 2
    right = np.clip(np.searchsorted(steps_N, centres), 1, max(len(steps_N) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(steps_N) - 1)
    nearest = np.where(centres - steps_N[left] <= steps_N[right] - centres, left, right)
    out = values[nearest].astype(np.float64)
    for c in np.unique(column):
        out[c] = _mean(values[column == c].astype(np.float64))
    return out, edges[1:]


def log_ratios(past: LoadHistory) -> tuple[Array, float]:
    """Base-2 logarithm of each expert's share over the uniform one, in columns of time [C, layers, experts] (-inf: no
    token), and where to end a scale of it: at 2, 4, 8 or 16 times."""
    ratio = time_columns(past.steps_N, past.load_NLE)[0] * past.load_NLE.shape[2]
    with np.errstate(divide="ignore"):
        log_ratio = np.log2(ratio)
    return log_ratio, past.limit(log_ratio)


def first_step(steps: Array) -> float:
    """Where the first column begins: a line covers the steps before it."""
    start = max(0.0, steps[0] - (steps[-1] - steps[0]) / max(len(steps) - 1, 1))
    return float(min(start, steps[-1] - 1))


def dead_windows(past: LoadHistory) -> Array:
    """Whether each expert is dead, bool [N - window + 1, L, E], in the window of log lines that ends at line
    window - 1, window, ...: its mean share is under a hundredth of the mean over the experts of its layer."""
    w = past.window
    lines, layers, experts = past.load_NLE.shape
    dead = np.zeros((lines - w + 1, layers, experts), dtype=bool)
    for layer in range(layers):  # one at a time: the sums in double precision of all are large
        load_NE = past.load_NLE[:, layer].astype(np.float64)
        known_NE = np.isfinite(load_NE)
        total, count = _window_sums(np.where(known_NE, load_NE, 0), w), _window_sums(known_NE, w)
        mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        known = np.isfinite(mean)
        level = np.where(known, mean, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
        # A sum that should be nothing is a difference of two large ones: a margin for its rounding.
        dead[:, layer] = known & (mean < DEAD_BELOW * level[:, None] - 1e-12) & (level[:, None] > 0)
    return dead


def _window_sums(values_NE: Array, w: int) -> Array:
    sums = np.cumsum(np.concatenate([np.zeros((1, values_NE.shape[1])), values_NE]), axis=0)
    return sums[w:] - sums[:-w]


def dead_experts(past: LoadHistory, dead: Array) -> list[dict[str, Any]]:
    """The experts that are dead in the last window: layer, expert, and the first step of the unbroken row of windows
    in which each is ("since_step")."""
    found = []
    for layer, expert in zip(*np.nonzero(dead[-1])):
        alive = np.flatnonzero(~dead[:, layer, expert])
        first = int(alive[-1]) + 1 if len(alive) else 0
        found.append({"layer": past.layers[layer], "expert": int(expert), "since_step": int(past.steps_N[first])})
    return found


def busiest_experts(past: LoadHistory, number: int = 10) -> list[dict[str, Any]]:
    """The experts with the largest mean share over the last window, over all layers: layer, expert, share, and
    "times_mean", the share over the mean of the layer."""
    last_LE = np.nan_to_num(past.last_LE)
    ratio_LE = last_LE / np.maximum(last_LE.mean(axis=1, keepdims=True), 1e-12)
    order = np.argsort(-ratio_LE, axis=None, kind="stable")[:number]
    return [
        {"layer": past.layers[i], "expert": int(e), "share": float(last_LE[i, e]), "times_mean": float(ratio_LE[i, e])}
        for i, e in zip(*np.unravel_index(order, ratio_LE.shape))
    ]
