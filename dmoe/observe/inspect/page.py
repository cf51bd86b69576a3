"""Writing an inspection: a page that needs nothing but a browser, pictures, JSON, and the summary as arrays."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dmoe.errors import RunError
from dmoe.observe.files import write_bytes
from dmoe.observe.inspect.details import Inspection, layer_numbers, token_rows, top_pairs
from dmoe.observe.routing import save

if TYPE_CHECKING:
    from dmoe.observe.plots import Picture

PAGE, DATA, SUMMARY, PLOTS = "inspect.html", "inspect.json", "routing.npz", "plots"
_JSON_TOKENS = 10


class Card(NamedTuple):
    """One key figure; `key` is its stable name in the page, as data-card."""

    key: str
    label: str
    value: str
    note: str = ""


def write_inspection(inspection: Inspection, folder: Path, *, png: bool = True) -> Path:
    """Write inspect.html, inspect.json, routing.npz and, with `png`, plots/*.png into `folder`, which is made; returns
    the page.

    Raises:
        RunError: the disk refuses.
    """
    from dmoe.observe import plots  # matplotlib
    from dmoe.observe.inspect.pictures import draw

    with plots.style(png):
        pictures = draw(inspection)
    page = render_page(inspection, pictures)
    data = json.dumps(as_json(inspection), ensure_ascii=False, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for picture in (picture for group in pictures.values() for picture in group if picture.png):
            (folder / PLOTS).mkdir(exist_ok=True)
            write_bytes(folder / PLOTS / f"{picture.name}.png", picture.png)
        save(folder / SUMMARY, inspection.reading.summary)
        write_bytes(folder / DATA, data.encode())
        write_bytes(folder / PAGE, page.encode())
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder / PAGE


def render_page(inspection: Inspection, pictures: dict[str, list[Picture]]) -> str:
    """The page as text; everything that comes from the model and the text is escaped."""
    from dmoe.observe.report.page import render_template

    return render_template(
        "inspect.html.jinja",
        view=inspection,
        summary=inspection.reading.summary,
        cards=cards(inspection),
        pictures=pictures,
        png=any(picture.png for group in pictures.values() for picture in group),
        rows=layer_numbers(inspection),
        moved=drift_rows(inspection),
        hue=lambda expert: f"{expert * 137.508 % 360:.0f}",  # the golden angle: neighbours differ
    )


def cards(inspection: Inspection) -> list[Card]:
    """The key figures at the head of the page."""
    reading, other = inspection.reading, inspection.other
    summary, rows = reading.summary, layer_numbers(inspection)
    loss = "nats per token" + ("" if other is None else f"; {_number(other.loss)} in {inspection.other_title}")
    worst = max(rows, key=lambda row: row["max_over_mean"])
    dead, experts = sum(row["dead"] for row in rows), summary.load_LE.size
    perplexity = math.exp(min(reading.loss, 700.0)) if math.isfinite(reading.loss) else math.nan
    out = [
        Card("loss", "Loss on this text", _number(reading.loss), loss),
        Card("perplexity", "Perplexity", f"{perplexity:.4g}" if math.isfinite(perplexity) else "\u2013", "per token"),
        Card("bits_per_byte", "Bits per byte", _number(inspection.bits_per_byte), f"{summary.num_tokens:,} tokens"),
        Card("imbalance", "Most imbalanced layer", f"{worst['max_over_mean']:.2f}\u00d7",
             f"max / mean load, layer {worst['layer']}"),
        Card("dead_experts", "Dead experts", f"{dead:,}", f"of {experts:,}, on this text"),
        Card("specialization", "Specialisation", f"{reading.specialization_L.mean():.0%}",
             "of the choice of experts follows from the token alone"),
    ]  # fmt: skip
    if inspection.moved is not None:
        equal = inspection.moved.equal_picks_L.mean()
        out.append(Card("equal_picks", "Equal picks", f"{equal:.1%}", f"with {inspection.other_title}"))
    if summary.dropped_L.any():
        out.append(Card("dropped", "Dropped picks", f"{summary.dropped_L.mean():.1%}", "over capacity"))
    return out if len(out) == 6 else [card for card in out if card.key != "perplexity"]


def drift_rows(inspection: Inspection) -> list[dict[str, Any]]:
    """Each layer's drift in numbers; empty without another model."""
    moved = inspection.moved
    if moved is None:
        return []
    return [
        {
            "layer": int(layer),
            "equal_picks": float(moved.equal_picks_L[i]),
            "equal_sets": float(moved.equal_sets_L[i]),
            "load_divergence": float(moved.load_divergence_L[i]),
            "likeness": float(moved.likeness_L[i]),
        }
        for i, layer in enumerate(moved.layers)
    ]


def as_json(inspection: Inspection) -> dict[str, Any]:
    """All numbers, and the first tokens of every expert of every layer. What is not known is null."""
    reading = inspection.reading
    summary, show = reading.summary, inspection.tokens.show
    layers = []
    for place, numbers in enumerate(layer_numbers(inspection)):
        experts = [
            {
                "load": _rounded(summary.load_LE[place, expert]),
                "tokens": [
                    {"id": token, "token": show(token), "lift": _rounded(lift), "count": count}
                    for token, lift, count in token_rows(reading, place, expert, _JSON_TOKENS)
                ],
            }
            for expert in range(summary.num_experts)
        ]
        pairs = [
            {"experts": [one, two], "lift": _rounded(lift), "share": _rounded(share)}
            for one, two, lift, share in top_pairs(reading, place)
        ]
        histogram = [_rounded(share) for share in summary.confidence_hist_LB[place]]
        layers.append(
            {name: _rounded(value) for name, value in numbers.items()}
            | {"confidence_histogram": histogram, "picked_together": pairs, "experts": experts}
        )
    return {
        "name": inspection.title,
        "step": summary.step,
        "text": {"name": inspection.text_name, "tokens": summary.num_tokens, "hash": summary.text_hash},
        "top_k": summary.top_k,
        "num_experts": summary.num_experts,
        "loss": _rounded(reading.loss),
        "bits_per_byte": _rounded(inspection.bits_per_byte),
        "layers": layers,
        "likeness": [[_rounded(value) for value in row] for row in reading.likeness_LL],
        "against": None
        if inspection.other is None
        else {
            "name": inspection.other_title,
            "step": inspection.other.summary.step,
            "loss": _rounded(inspection.other.loss),
            "layers": [{name: _rounded(value) for name, value in row.items()} for row in drift_rows(inspection)],
        },
    }


def _rounded(value: Any) -> Any:
    """Six digits are enough for people and tools; not finite is null."""
    if isinstance(value, int):
        return value
    return float(f"{float(value):.6g}") if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "\u2013"
