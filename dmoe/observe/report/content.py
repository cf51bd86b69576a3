"""Everything that the page of one run shows, read and worked out; and the same as plain data for report.json."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.observe.report import routing as routed
from dmoe.observe.report import tools
from dmoe.observe.report.figures import Card, Experts, key_figures, model_line, status
from dmoe.observe.report.loads import Array, time_columns
from dmoe.observe.report.run import Record, Run, load_run

_CURVES = (
    "loss", "lr", "grad_norm", "tokens_per_second", "step_seconds", "mfu", "model_tflops", "memory_gib", "aux_loss",
    "z_loss", "ep_imbalance", "ep_imbalance_cost",
)  # fmt: skip
_LAYER_CURVES = ("max_over_mean", "router_entropy", "router_confidence", "dropped")
_EVAL_CURVES = ("loss", "bits_per_byte")


@dataclass(frozen=True)
class Content:
    """One run's page."""

    run: Run
    status: str
    model_line: str
    cards: list[Card]
    experts: Experts | None
    rank_lines: list[Record]
    """Train lines with the load of the expert-parallel ranks, of one shape."""
    routing: routed.Routing | None
    coactivation: list[dict[str, Any]]
    top_tokens: list[dict[str, Any]]
    drift: Sequence[dict[str, Any]]
    timeline: dict[str, Any]
    memory: dict[str, Any]
    links: list[dict[str, str]]
    problems: list[dict[str, str]]


def load_content(run_dir: Path) -> Content:
    """Errors as in `load_run`."""
    run = load_run(run_dir)
    experts = Experts.of(run)
    routing = routed.load_routing(run_dir)
    problems = tools.problems(run)
    problems += [{"message": message, "href": ""} for message in (routing.problems if routing else [])]
    return Content(
        run=run,
        status=status(run),
        model_line=model_line(run, experts),
        cards=key_figures(run, experts),
        experts=experts,
        rank_lines=_rank_lines(run.train),
        routing=routing,
        coactivation=routed.coactivation(routing) if routing else [],
        top_tokens=routed.top_tokens(routing, run_dir) if routing else [],
        drift=routed.drift_rows(routing) if routing else [],
        timeline=tools.load_timeline(run_dir),
        memory=tools.load_memory(run_dir),
        links=tools.links(run_dir),
        problems=problems,
    )


def has(records: Sequence[Record], key: str) -> bool:
    """Whether any line has a value for `key`."""
    return any(record.get(key) is not None for record in records)


def _rank_lines(train: Sequence[Record]) -> list[Record]:
    lines = [record for record in train if record.get("rank_load") is not None]
    return [record for record in lines if record["rank_load"].shape == lines[-1]["rank_load"].shape]


def figures_json(content: Content) -> bytes:
    """All figures of the page as a JSON object; numbers that are not known or not finite are null."""
    run = content.run
    figures: dict[str, Any] = {
        "run": run.name,
        "status": content.status,
        "model": content.model_line,
        "figures": {
            card.key: {"label": card.label, "value": card.number, "text": card.value, "note": card.note}
            for card in content.cards
        },
        "train": {key: _curve(run.train, key) for key in _CURVES if has(run.train, key)},
        "validation": {key: _curve(run.evals, key) for key in _EVAL_CURVES if has(run.evals, key)},
        "events": [{"step": event["step"], "message": event.get("message", "")} for event in run.events],
        "problems": content.problems,
    }
    if content.experts:
        figures["experts"] = _experts_json(content.experts)
    if content.rank_lines:
        figures["rank_load"] = _rank_json(content.rank_lines)
    if content.routing:
        figures["routing"] = _routing_json(content)
    if content.timeline:
        figures["timeline"] = content.timeline
    if content.memory:
        figures["memory"] = {key: value for key, value in content.memory.items() if key != "worst"}
    if content.links:
        figures["files"] = content.links
    return json.dumps(plain(figures), allow_nan=False, separators=(",", ":")).encode()


def _curve(records: Sequence[Record], key: str) -> dict[str, Any]:
    """The curve as the page draws it: long ones keep the smallest and largest value of each span."""
    from dmoe.observe.plots import envelope, series

    steps, values = envelope(*series(records, key))
    return {"step": steps, "value": values}


def _experts_json(experts: Experts) -> dict[str, Any]:
    from dmoe.observe.expert_plots import per_layer
    from dmoe.observe.plots import envelope

    past = experts.past
    curves: dict[str, Any] = {}
    for key in _LAYER_CURVES:
        if has(past.records, key):
            values = per_layer(past.records, key, len(past.layers))
            lines = [envelope(past.steps_N, values[:, i], 60) for i in range(len(past.layers))]
            curves[key] = [{"step": steps, "value": kept} for steps, kept in lines]
    share, steps = time_columns(past.steps_N, past.load_NLE)
    return {
        "window_lines": past.window,
        "layers": experts.rows,
        "dead": experts.dead,
        "busiest": experts.busiest,
        "load_in_window": np.round(past.last_LE, 6),
        "load_over_time": {"to_step": steps, "share": np.round(share, 5)},
        "over_time": curves,
    }


def _rank_json(lines: Sequence[Record]) -> dict[str, Any]:
    steps = np.array([line["step"] for line in lines], dtype=float)
    share, to_step = time_columns(steps, np.stack([line["rank_load"] for line in lines]))
    return {"to_step": to_step, "share": np.round(share, 5)}


def _routing_json(content: Content) -> dict[str, Any]:
    assert content.routing is not None
    last = content.routing.last
    return {
        "step": last.step,
        "tokens": last.num_tokens,
        "layers": content.routing.layers,
        "entropy": last.entropy_L,
        "confidence": last.confidence_L,
        "margin": last.margin_L,
        "dropped": last.dropped_L,
        "confidence_histogram": np.round(last.confidence_hist_LB, 6),
        "pairs": [{"layer": item["layer"], "pairs": item["pairs"]} for item in content.coactivation],
        "top_tokens": content.top_tokens,
        "equal_picks": {
            "step": content.routing.steps_S[:-1],
            "with_next": content.routing.equal_next_SL,
            "with_last": content.routing.equal_last_SL,
        },
    }


def plain(value: Any) -> Any:
    """`value` with arrays as lists and numbers that are not finite as None."""
    if isinstance(value, np.ndarray):
        return _finite_list(value)
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _finite_list(values: Array) -> Any:
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return values.tolist()
    return np.where(np.isfinite(values), values, np.array(None, dtype=object)).tolist()
