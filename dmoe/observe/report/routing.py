"""The routing of a fixed piece of text, which a run keeps at each validation (RUN/routing/step-*.npz)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmoe.errors import RunError
from dmoe.observe.report.loads import Array
from dmoe.observe.report.tiles import Scale, tile

if TYPE_CHECKING:
    from dmoe.observe.routing import RoutingSummary

_MOST_SUMMARIES = 40  # of a run: first, last, and evenly between them
_MOST_CELLS = 600_000  # of the co-activation maps: bounds the size of the page
_MOST_ROWS = 640  # of the tables of tokens, over all layers
_TOKENS_SHOWN = 8


@dataclass(frozen=True)
class Routing:
    """The last summary of a run, and how equal the picks of the earlier ones of the same text are to it.

    `equal_next_SL` and `equal_last_SL`, float [S - 1, L]: share of a token's picks that summary i has in common with
    summary i + 1, and with the last. `problems`: files that could not be read.
    """

    last: RoutingSummary
    steps_S: list[int]
    equal_next_SL: Array
    equal_last_SL: Array
    problems: list[str]

    @property
    def layers(self) -> list[int]:
        return [int(layer) for layer in self.last.layers]


def load_routing(run_dir: Path) -> Routing | None:
    """None if nothing was kept. A damaged file is left out and named in `problems`."""
    paths = sorted((run_dir / "routing").glob("step-*.npz"))
    if not paths:
        return None
    from dmoe.observe.routing.files import load  # brings torch

    problems = []
    last: RoutingSummary | None = None
    steps: list[int] = []
    picks: list[Array] = []
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), _MOST_SUMMARIES)).round().astype(int))
    for i in reversed(chosen):
        try:
            summary = load(paths[i])
        except RunError as error:
            problems.append(str(error).replace(f"{run_dir}/", ""))
            continue
        last = last or summary
        if _comparable(summary, last):
            steps.insert(0, summary.step)
            picks.insert(0, summary.picks_LTK)
    if last is None:
        return None
    experts = last.num_experts
    following = [equal_picks(a, b, experts) for a, b in pairwise(picks)]
    final = [equal_picks(a, picks[-1], experts) for a in picks[:-1]]
    shape = (len(steps) - 1, len(last.layers))
    return Routing(last, steps, np.reshape(following, shape), np.reshape(final, shape), problems)


def _comparable(a: RoutingSummary, b: RoutingSummary) -> bool:
    """Whether they are of the same text, and of layers of the same shape."""
    same = a.text_hash == b.text_hash and a.picks_LTK.shape[:2] == b.picks_LTK.shape[:2]
    return same and a.num_experts == b.num_experts and np.array_equal(a.layers, b.layers)


def equal_picks(a_LTK: Array, b_LTK: Array, num_experts: int) -> Array:
    """Share of a token's picks that are in both, mean over the tokens, float64 [L]; ids from `num_experts` on are no
    picks, and a token with none in either counts as equal. 1 for no token."""
    if not a_LTK.shape[1]:
        return np.ones(a_LTK.shape[0])
    both_LT = np.zeros(a_LTK.shape[:2], dtype=np.int64)
    for k in range(a_LTK.shape[2]):
        pick_LT1 = a_LTK[:, :, k : k + 1]
        both_LT += ((pick_LT1 == b_LTK) & (pick_LT1 < num_experts)).any(axis=2)
    most_LT = np.maximum((a_LTK < num_experts).sum(axis=2), (b_LTK < num_experts).sum(axis=2))
    return np.asarray(np.where(most_LT > 0, both_LT / np.maximum(most_LT, 1), 1.0).mean(axis=1))


def coactivation(routing: Routing) -> list[dict[str, Any]]:
    """Maps of lift for as many layers as fit, evenly chosen: layer, address of the image, and the pairs of experts
    that are together far more often than by chance. The scale goes from an eighth to eight times."""
    summary = routing.last
    fitting = max(1, _MOST_CELLS // max(summary.num_experts**2, 1))
    layers = np.unique(np.linspace(0, len(summary.layers) - 1, min(len(summary.layers), fitting)).round().astype(int))
    maps = []
    for i in layers:
        lift_EE = summary.coactivation_lift(int(i))
        if not np.isfinite(lift_EE).any():  # one pick a token, or no token
            continue
        with np.errstate(divide="ignore"):
            image = tile(np.log2(lift_EE), LIFT_SCALE)
        maps.append({"layer": int(summary.layers[i]), "image": image, "pairs": _pairs(summary, int(i), lift_EE)})
    return maps


LIFT_SCALE = Scale(-3, 3, diverging=True)


def _pairs(summary: RoutingSummary, i: int, lift_EE: Array, number: int = 5) -> list[dict[str, Any]]:
    """The pairs with the most tokens above what chance makes of them; one with few tokens is no finding."""
    together_EE = summary.coactivation_LEE[i].astype(np.float64)
    lift_EE = np.nan_to_num(lift_EE, nan=1.0)
    excess_EE = np.triu(together_EE * (1 - 1 / np.maximum(lift_EE, 1e-9)), 1)
    order = np.argsort(-excess_EE, axis=None, kind="stable")[:number]
    return [
        {"experts": [int(a), int(b)], "lift": float(lift_EE[a, b]), "share_of_tokens": float(together_EE[a, b])}
        for a, b in zip(*np.unravel_index(order, excess_EE.shape))
        if excess_EE[a, b] > 0
    ]


def top_tokens(routing: Routing, run_dir: Path) -> list[dict[str, Any]]:
    """Layers with their experts and the tokens that each gets more often than their share: layer, "left_out" (experts
    that have tokens but no room), and experts: expert, load, tokens ("text", "id", "lift", "count")."""
    summary = routing.last
    decode = _decoder(run_dir / "tokenizer.json")
    rows = max(4, _MOST_ROWS // max(len(summary.layers), 1))
    layers = []
    for i, layer in enumerate(summary.layers):
        listed_E = (summary.token_ids_LEN[i] >= 0).any(axis=1)
        # Where not all fit, the experts whose first tokens are the most their own.
        special_E = np.where(listed_E, summary.token_lift_LEN[i, :, :_TOKENS_SHOWN].mean(axis=1), -1.0)
        chosen = np.sort(np.argsort(-special_E, kind="stable")[: min(rows, int(listed_E.sum()))])
        experts = [_expert_tokens(summary, i, int(e), decode) for e in chosen]
        left_out = int(listed_E.sum()) - len(experts)
        if experts:
            layers.append({"layer": int(layer), "experts": experts, "left_out": left_out})
    return layers


def _expert_tokens(summary: RoutingSummary, i: int, e: int, decode: Any) -> dict[str, Any]:
    tokens = [
        {"text": decode(int(token)), "id": int(token), "lift": round(float(lift), 2), "count": int(count)}
        for token, lift, count in zip(
            summary.token_ids_LEN[i, e, :_TOKENS_SHOWN], summary.token_lift_LEN[i, e], summary.token_count_LEN[i, e]
        )
        if token >= 0
    ]
    return {"expert": e, "load": float(summary.load_LE[i, e]), "tokens": tokens}


def _decoder(path: Path) -> Any:
    """A function from a token's id to its text; "#id" where there is no tokenizer or it does not know the id."""
    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
    except Exception:  # tokenizers raises Exception itself, for a file that is absent or damaged
        return lambda token: f"#{token}"

    def decode(token: int) -> str:
        text: str = tokenizer.decode([token], skip_special_tokens=False)
        if text and "\ufffd" not in text:
            return text
        return tokenizer.id_to_token(token) or f"#{token}"  # part of a character, or what decoding leaves out

    return decode


def drift_rows(routing: Routing) -> Sequence[dict[str, Any]]:
    """For each kept step but the last: step, and its share of equal picks with the next and the last."""
    return [
        {"step": step, "with_next": float(following.mean()), "with_last": float(final.mean())}
        for step, following, final in zip(routing.steps_S, routing.equal_next_SL, routing.equal_last_SL)
    ]
