"""The maps of load over time as the page shows them: one image a layer, small among the others or opened large."""

from __future__ import annotations

from typing import Any

import numpy as np

from dmoe.observe.report.figures import Experts
from dmoe.observe.report.loads import first_step
from dmoe.observe.report.tiles import Scale, tile

_LISTED = 5


def load_maps(experts: Experts, limit: float | None = None) -> dict[str, Any]:
    """Images and what stands beside each when it is opened.

    Args:
        limit: end of the scale as a base-2 logarithm; default: what fits the run.
    """
    past = experts.past
    log_ratio, own_limit = experts.log_ratios
    limit = own_limit if limit is None else limit
    scale = Scale(-limit, limit, diverging=True)
    last_LE = past.last_LE
    layers = []
    for i, row in enumerate(experts.rows):
        share_E = np.nan_to_num(last_LE[i])
        order = np.argsort(-share_E, kind="stable")
        uniform = max(float(share_E.mean()), 1e-12)
        listed = [{"expert": int(e), "share": float(share_E[e]), "times": float(share_E[e] / uniform)} for e in order]
        layers.append(
            {
                "layer": row["layer"],
                "image": tile(log_ratio[:, i].T, scale),
                "row": row,
                "busiest": listed[:_LISTED],
                "idlest": listed[::-1][:_LISTED],
                "dead": [found for found in experts.dead if found["layer"] == row["layer"]],
            }
        )
    steps = np.linspace(first_step(past.steps_N), past.steps_N[-1], 5)
    return {
        "layers": layers,
        "experts": past.load_NLE.shape[2],
        "steps": [f"{step:,.0f}" for step in steps],
        "legend": scale.legend,
        "ends": [f"1/{2**limit:g}\u00d7", f"{2**limit:g}\u00d7"],
        "lines_a_column": max(1, round(len(past.steps_N) / len(log_ratio))),
        "window": past.window,
    }
