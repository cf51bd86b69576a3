"""What uneven load of expert-parallel ranks costs, as an estimate.

All ranks of a layer wait for the one with most picks, in its experts and in the exchange before and after them. If the
busiest has m times the mean load, that part of the step takes m times what it would take at equal load, and 1 - 1 / m
of it is lost. So the share of the step that is lost is

    (1 - 1 / m) * p,    p: the part of the step that experts and exchange take as it is

p is measured where there is a timeline of the run (`profiling.timeline`). Else it is estimated from FLOPs: with q the
experts' share of the model's FLOPs, p = q m / (1 + q (m - 1)). That counts no exchange, and takes the experts to run at
the same FLOP/s as the rest, so that it is too low where the exchange is slow. Picks over a capacity are counted as if
they were computed.
"""

from __future__ import annotations

import json
from pathlib import Path

from dmoe.config import ModelConfig, RunConfig
from dmoe.models import count_parameters
from dmoe.moe import Experts


def expert_flops_share(config: ModelConfig, seq_len: int) -> float:
    """Share of the routed experts in the model's FLOPs a token (`Decoder.flops_per_token`); 0 for a dense model."""
    layers = len(config.moe_layers())
    if not layers:
        return 0.0
    moe = config.layer_moe_config()
    a_layer = sum(p.numel() for p in Experts(moe, device="meta").parameters()) * moe.top_k / moe.num_experts
    return 6 * layers * a_layer / float(count_parameters(config, seq_len)["flops_per_token"])


def lost_share(max_over_mean: float, flops_share: float, measured: float | None = None) -> float:
    """Share of the step time lost to the imbalance, from 0 to less than 1.

    Args:
        max_over_mean: load of the busiest rank over the mean load, mean over layers.
        flops_share: of `expert_flops_share`.
        measured: the part of the step that experts and exchange take, waiting included; None: not known.
    """
    part = measured
    if part is None:
        part = flops_share * max_over_mean / (1 + flops_share * (max_over_mean - 1))
    return (1 - 1 / max_over_mean) * part


class ImbalanceCost:
    """`lost_share` for a run: called with max / mean of the ranks' loads."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        spread = config.parallel.ep > 1
        self._flops_share = expert_flops_share(config.model, config.train.seq_len) if spread else 0.0
        self._timeline = run_dir / "profiling" / "timeline" / "summary.json" if config.profiling.timeline else None

    def __call__(self, max_over_mean: float) -> float:
        measured = None if self._timeline is None else measured_part(self._timeline)
        return lost_share(max_over_mean, self._flops_share, measured)


def measured_part(timeline: Path) -> float | None:
    """The part of a step in experts and exchange, mean over ranks; None before there is a timeline."""
    try:
        found = json.loads(timeline.read_text())
        regions, steps = found["regions"], found["step_seconds"]
        busy = [sum(times) for times in zip(regions["experts"], regions["exchange"])]
        parts = [inside / step for inside, step in zip(busy, steps, strict=True)]
        return min(1.0, sum(parts) / len(parts))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
