"""From a reading to what is shown of it: layers, experts with their tokens, and tokens with their experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dmoe.config import require
from dmoe.observe.inspect.reading import Reading
from dmoe.observe.inspect.text import Snippet, TokenText
from dmoe.observe.routing import Drift, drift
from dmoe.observe.routing.summary import Array

# What the page lists at most, so that it stays a few megabytes however large the model is. The JSON has all experts.
MAX_LAYERS, MAX_EXPERTS, MAX_ROWS = 12, 64, 384
TOKENS, CONTEXTS, PAIRS = 10, 3, 4


@dataclass(frozen=True)
class ExpertView:
    """One expert of one layer."""

    expert: int
    load: float
    """Share of the layer's picks over the even share, 1 / E."""
    tokens: list[tuple[str, float, int]]
    """Token, lift and count, by falling lift."""
    contexts: list[Snippet]


@dataclass(frozen=True)
class LayerView:
    """One layer in detail."""

    layer: int
    experts: list[ExpertView]
    """Those with the highest load, by number."""
    hidden: int
    """Experts that are not listed."""
    pairs: list[tuple[int, int, float, float]]
    """Two experts, lift of being picked together, and share of the tokens that picked both; by falling lift."""


@dataclass(frozen=True)
class Inspection:
    """All that the page shows of one model, and of another one beside it."""

    reading: Reading
    tokens: TokenText
    title: str
    model_line: str
    text_name: str
    bits_per_byte: float
    layers: list[LayerView]
    """The layers that are shown in detail."""
    shown: list[tuple[str, list[list[int]]]]
    """The first tokens of the text, each with the experts of each layer in `layers`."""
    other: Reading | None = None
    other_title: str = ""
    moved: Drift | None = None


def inspect_reading(
    reading: Reading,
    tokens: TokenText,
    *,
    title: str,
    model_line: str = "",
    text_name: str = "",
    bytes_V: Array | None = None,
    layers: Sequence[int] | None = None,
    show: int = 40,
    other: Reading | None = None,
    other_title: str = "",
) -> Inspection:
    """Choose and name what is shown.

    Args:
        bytes_V: bytes of text that each token id stands for. None: bits per byte are not known.
        layers: the model's indices of the layers to show in detail. None: up to 12, evenly from the first to the last.
        show: tokens from the beginning of the text whose experts are shown one by one.
        other: of another model, of the same text.

    Raises:
        ConfigError: a layer that is no MoE layer, or an `other` of another text, other layers or other experts.
    """
    summary = reading.summary
    indices: list[int] = summary.layers.tolist()
    for layer in layers or ():
        require(layer in indices, "layers", layer, f"MoE layers of the model: {', '.join(map(str, indices))}")
    places = _evenly(len(indices)) if layers is None else [indices.index(layer) for layer in layers]
    per_layer = max(4, min(MAX_EXPERTS, MAX_ROWS // max(len(places), 1)))
    picks = summary.picks_LTK[places, :show]
    return Inspection(
        reading=reading,
        tokens=tokens,
        title=title,
        model_line=model_line,
        text_name=text_name,
        bits_per_byte=_bits_per_byte(reading, bytes_V),
        layers=[_layer_view(reading, tokens, place, per_layer) for place in places],
        shown=[
            (tokens.show(int(token)), [[e for e in row if e < summary.num_experts] for row in picks[:, t].tolist()])
            for t, token in enumerate(reading.token_ids_T[:show])
        ],
        other=other,
        other_title=other_title,
        moved=None if other is None else drift(summary, other.summary),
    )


def _evenly(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, MAX_LAYERS))})


def _bits_per_byte(reading: Reading, bytes_V: Array | None) -> float:
    if bytes_V is None:
        return math.nan
    ids = reading.token_ids_T[reading.predicted_P]
    num_bytes = int(bytes_V[ids[ids < len(bytes_V)]].sum())
    return reading.loss * len(ids) / math.log(2) / num_bytes if num_bytes else math.nan


def _layer_view(reading: Reading, tokens: TokenText, place: int, experts: int) -> LayerView:
    load_E = reading.summary.load_LE[place]
    listed = np.sort(np.argsort(-load_E, kind="stable")[:experts])
    return LayerView(
        layer=int(reading.summary.layers[place]),
        experts=[_expert_view(reading, tokens, place, int(expert)) for expert in listed],
        hidden=len(load_E) - len(listed),
        pairs=top_pairs(reading, place),
    )


def _expert_view(reading: Reading, tokens: TokenText, place: int, expert: int) -> ExpertView:
    summary = reading.summary
    return ExpertView(
        expert=expert,
        load=float(summary.load_LE[place, expert] * summary.num_experts),
        tokens=[(tokens.show(i), lift, count) for i, lift, count in token_rows(reading, place, expert, TOKENS)],
        contexts=[
            tokens.snippet(reading.token_ids_T, position) for position in example_positions(reading, place, expert)
        ],
    )


def token_rows(reading: Reading, place: int, expert: int, number: int) -> list[tuple[int, float, int]]:
    """Id, lift and count of the first `number` listed tokens of an expert."""
    ids, lifts, counts = (
        values[place, expert, :number].tolist()
        for values in (reading.summary.token_ids_LEN, reading.summary.token_lift_LEN, reading.summary.token_count_LEN)
    )
    return [row for row in zip(ids, lifts, counts) if row[0] >= 0]


def example_positions(reading: Reading, place: int, expert: int, number: int = CONTEXTS) -> list[int]:
    """Places in the text where the expert is picked: for the first of its listed tokens the middle one each, or, where
    none is listed, evenly over all."""
    picked_T = (reading.summary.picks_LTK[place] == expert).any(axis=1)
    wanted = [row[0] for row in token_rows(reading, place, expert, number)]
    if not wanted:
        found = np.flatnonzero(picked_T)
        return found[np.linspace(0, len(found) - 1, min(number, len(found))).astype(int)].tolist() if len(found) else []
    positions = [np.flatnonzero(picked_T & (reading.token_ids_T == token)) for token in wanted]
    return [int(places[len(places) // 2]) for places in positions if len(places)]


def top_pairs(reading: Reading, place: int, number: int = PAIRS) -> list[tuple[int, int, float, float]]:
    """The pairs of experts that are picked together most above chance, of those that 5 tokens or more picked."""
    summary = reading.summary
    lift_EE, share_EE = summary.coactivation_lift(place), summary.coactivation_LEE[place]
    enough = np.triu(share_EE * summary.num_tokens >= 4.5, 1) & np.isfinite(lift_EE) & (lift_EE > 1)
    one, other = np.nonzero(enough)
    order = np.argsort(-lift_EE[one, other], kind="stable")[:number]
    return [
        (int(a), int(b), float(lift_EE[a, b]), float(share_EE[a, b])) for a, b in zip(one[order], other[order])
    ]  # fmt: skip


def layer_numbers(inspection: Inspection) -> list[dict[str, Any]]:
    """Every layer in numbers, for the table of the page, the console and the JSON."""
    reading = inspection.reading
    summary = reading.summary
    return [
        {
            "layer": int(layer),
            "max_over_mean": float(summary.max_over_mean_L[i]),
            "dead": int(summary.dead_L[i]),
            "entropy": float(summary.entropy_L[i]),
            "confidence": float(summary.confidence_L[i]),
            "margin": float(summary.margin_L[i]),
            "dropped": float(summary.dropped_L[i]),
            "specialization": float(reading.specialization_L[i]),
        }
        for i, layer in enumerate(summary.layers)
    ]
