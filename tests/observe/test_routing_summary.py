"""Summaries of routing against loops over the tokens in float64, and what a planted routing must show."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dmoe.errors import ConfigError, RunError
from dmoe.observe.routing import LayerRouting, RoutingAccumulator, RoutingSummary, drift, load, save, summarize
from dmoe.observe.routing import accumulator as accumulator_module
from dmoe.observe.routing.drift import jensen_shannon
from dmoe.observe.routing.likeness import likeness
from dmoe.observe.routing.specialization import specialization
from dmoe.observe.routing.tokens import text_of

CASES = {  # tokens, experts, picks, share of picks dropped to "no expert"
    "plain": (97, 8, 2, 0.0),
    "odd": (61, 5, 3, 0.0),
    "all_experts": (40, 4, 4, 0.0),
    "one_expert": (30, 1, 1, 0.0),
    "no_expert_for_some": (80, 7, 2, 0.3),
    "one_token": (1, 6, 2, 0.0),
    "dead_experts": (50, 33, 1, 0.0),
}


def draw(case: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [T, K], probabilities [T, E], token ids [T]."""
    tokens, experts, top_k, none = CASES[case]
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(tokens, experts)) * 2
    if case == "dead_experts":
        logits[:, 20:] -= 50
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.argsort(-probs, axis=1)[:, :top_k]
    ids = np.where(rng.random(ids.shape) < none, experts, ids)
    return ids, probs, rng.integers(0, 9, tokens)


def oracle(ids: np.ndarray, probs: np.ndarray, tokens: np.ndarray, top_k: int) -> dict[str, np.ndarray]:
    """Everything but the token tables, by loops."""
    count, experts = probs.shape
    load, together, hist = np.zeros(experts), np.zeros((experts, experts)), np.zeros(20)
    entropy = confidence = margin = 0.0
    for row, p in zip(ids, probs):
        picked = [e for e in row if e < experts]
        for a in picked:
            load[a] += 1
            for b in picked:
                together[a, b] += 1 / count
        entropy -= sum(x * math.log(x) for x in p if x > 0) / count
        ordered = sorted(p, reverse=True)
        confidence += ordered[0] / count
        margin += (ordered[top_k - 1] - ordered[top_k] if top_k < experts else 0.0) / count
        hist[min(int(ordered[0] * 20), 19)] += 1 / count
    return {
        "load_LE": load / max(load.sum(), 1), "prob_LE": probs.mean(axis=0), "entropy_L": entropy,
        "confidence_L": confidence, "margin_L": margin, "confidence_hist_LB": hist, "coactivation_LEE": together,
    }  # fmt: skip


def table(ids: np.ndarray, tokens: np.ndarray, expert: int, min_count: int) -> list[tuple[int, float, int]]:
    """Token, lift, count of one expert, by loops."""
    mine = [t for row, t in zip(ids, tokens) for e in row if e == expert]
    rows = []
    for token in sorted(set(mine)):
        lift = (mine.count(token) / len(mine)) / (list(tokens).count(token) / len(tokens))
        if mine.count(token) >= min_count and lift > 1 + 1e-12:
            rows.append((int(token), lift, mine.count(token)))
    return sorted(rows, key=lambda row: (-round(row[1], 9), -row[2], row[0]))


@pytest.mark.parametrize("case", CASES)
def test_a_summary_is_what_loops_over_the_tokens_find(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulator_module, "_BLOCK", 64)  # several blocks a batch
    _, experts, top_k, _ = CASES[case]
    layers = {3: draw(case, 1), 7: draw(case, 2)}
    tokens = layers[3][2]
    layers[7] = (*layers[7][:2], tokens)
    accumulator = RoutingAccumulator([3, 7], experts, top_k)
    for start, stop in ((0, 23), (23, 23), (23, len(tokens))):  # one batch of no token
        for layer, (ids, probs, _) in layers.items():
            accumulator.add(
                layer, torch.from_numpy(ids[start:stop]), torch.from_numpy(probs[start:stop]), tokens[start:stop],
                dropped=2,
            )  # fmt: skip
    found = accumulator.summary(step=5, name="x", min_count=2)
    assert (found.num_tokens, found.top_k, found.num_experts, found.step, found.name) == (
        len(tokens), top_k, experts, 5, "x",
    )  # fmt: skip
    assert found.layers.tolist() == [3, 7]
    for place, (ids, probs, _) in enumerate(layers.values()):
        for name, wanted in oracle(ids, probs, tokens, top_k).items():
            np.testing.assert_allclose(getattr(found, name)[place], wanted, rtol=1e-6, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(found.picks_LTK[place], np.sort(ids, axis=1))
        assert found.dropped_L[place] == pytest.approx(6 / max((ids < experts).sum(), 1))
        for expert in range(experts):
            rows = table(ids, tokens, expert, 2)[:20]
            assert found.token_ids_LEN[place, expert, : len(rows)].tolist() == [row[0] for row in rows]
            np.testing.assert_allclose(
                found.token_lift_LEN[place, expert, : len(rows)], [r[1] for r in rows], rtol=1e-6
            )
            assert found.token_count_LEN[place, expert, : len(rows)].tolist() == [row[2] for row in rows]
            assert (found.token_ids_LEN[place, expert, len(rows) :] == -1).all()
    if case == "dead_experts":
        assert (found.dead_L >= 13).all()


def test_padding_is_left_out_and_no_token_is_no_nan() -> None:
    ids, probs, tokens = draw("plain")
    valid = np.arange(len(tokens)) % 3 != 0
    whole, kept = RoutingAccumulator([0], 8, 2), RoutingAccumulator([0], 8, 2)
    whole.add(0, ids, probs, tokens, valid_T=torch.from_numpy(valid))
    kept.add(0, ids[valid], probs[valid], tokens[valid])
    assert_equal(whole.summary(), kept.summary())
    empty = RoutingAccumulator([0, 1], 8, 2).summary()
    assert empty.num_tokens == 0
    for field in dataclasses.fields(empty):
        value = getattr(empty, field.name)
        assert not isinstance(value, np.ndarray) or np.isfinite(value).all()
    assert drift(empty, empty).equal_picks_L.tolist() == [1, 1]


def assert_equal(a: RoutingSummary, b: RoutingSummary) -> None:
    for field in dataclasses.fields(RoutingSummary):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_router_that_looks_at_the_token_alone_is_fully_specialised(top_k: int) -> None:
    """Expert e gets exactly the tokens that are e (or e + 1 too) modulo 4, with lift 4 / K."""
    rng = np.random.default_rng(0)
    tokens = rng.permutation(np.repeat(np.arange(40), 30))
    ids = np.stack([(tokens + k) % 4 for k in range(top_k)], axis=1)
    probs = np.full((len(tokens), 4), 0.25)
    summary = summarize({0: LayerRouting(torch.from_numpy(ids), torch.from_numpy(probs))}, tokens, top_k=top_k)
    for expert in range(4):
        wanted = [t for t in range(40) if any((t + k) % 4 == expert for k in range(top_k))]
        assert summary.token_ids_LEN[0, expert].tolist() == (wanted + [-1] * 20)[:20]
        assert summary.token_lift_LEN[0, expert, 0] == pytest.approx(4 / top_k)
        assert summary.token_count_LEN[0, expert, 0] == 30
    text = text_of(tokens)
    assert specialization(text, ids, 4) == pytest.approx(1, abs=1e-9)
    by_chance = np.argsort(rng.random((len(tokens), 4)), axis=1)[:, :top_k]
    assert specialization(text, by_chance, 4) < 0.05
    # Few occurrences of each token look like knowledge, and are none: found / most would be above a half here.
    rare = rng.integers(0, 300, 600)
    assert specialization(text_of(rare), rng.integers(0, 16, (600, 1)), 16) < 0.1
    # Half of the tokens by their id, the others by chance: in between.
    half = np.where((np.arange(len(tokens)) % 2 == 0)[:, None], ids, by_chance)
    assert 0.1 < specialization(text, half, 4) < 0.6


def test_nothing_to_know_is_no_specialisation() -> None:
    text = text_of(np.arange(50) % 7)
    assert specialization(text, np.zeros((50, 1), int), 1) == 0
    assert specialization(text, np.tile(np.arange(3), (50, 1)), 3) == 0  # K = E
    assert specialization(text, np.full((50, 2), 4), 4) == 0  # no pick
    assert specialization(text_of(np.arange(50)), np.arange(50)[:, None] % 4, 4) == 0  # every token is new


def test_picked_together_against_chance() -> None:
    """Experts 0 and 1 always together, 2 and 3 too: lift P(both) / (P P) over what even picks of 2 of 4 give."""
    ids = np.array([[0, 1], [2, 3]] * 20)
    probs = np.full((40, 4), 0.25)
    summary = summarize({0: LayerRouting(torch.from_numpy(ids), torch.from_numpy(probs))}, np.zeros(40), top_k=2)
    lift = summary.coactivation_lift(0)
    # Two of four at random hold a given pair with probability 1 / 6; here it is 1 / 2.
    assert lift[0, 1] == lift[2, 3] == pytest.approx(3)
    assert lift[0, 2] == 0
    assert np.isnan(np.diagonal(lift)).all()


def test_drift_of_a_summary() -> None:
    ids, probs, tokens = draw("plain", 3)
    a = summarize({0: LayerRouting(torch.from_numpy(ids), torch.from_numpy(probs))}, tokens, top_k=2, name="a")
    same = drift(a, a)
    assert (same.equal_picks_L, same.equal_sets_L, same.load_divergence_L) == (1, 1, 0)
    assert same.likeness_L[0] == pytest.approx(1)
    # Renumbered experts: other ids, the same grouping.
    new = np.roll(np.arange(8), 3)
    b = summarize({0: LayerRouting(torch.from_numpy(new[ids]), torch.from_numpy(probs))}, tokens, top_k=2)
    moved = drift(a, b)
    shared = [len(set(p) & set(q)) for p, q in zip(ids.tolist(), new[ids].tolist())]
    assert moved.equal_picks_L[0] == pytest.approx(np.mean(shared) / 2)
    assert moved.equal_sets_L[0] == pytest.approx(np.mean([n == 2 for n in shared]))
    assert moved.equal_picks_L[0] < 0.5
    assert moved.load_divergence_L[0] > 0
    assert moved.likeness_L[0] == pytest.approx(1)
    # Every second token kept: half of the picks are surely equal.
    mixed = np.where(np.arange(len(ids))[:, None] % 2 == 0, ids, (ids + 1) % 8)
    c = summarize({0: LayerRouting(torch.from_numpy(mixed), torch.from_numpy(probs))}, tokens, top_k=2)
    shared = [len(set(p) & set(q)) / 2 for p, q in zip(ids.tolist(), mixed.tolist())]
    assert drift(a, c).equal_picks_L[0] == pytest.approx(np.mean(shared))
    other = dataclasses.replace(b, text_hash="x", name="b")
    with pytest.raises(ConfigError, match="text of the second summary is 'b'"):
        drift(a, other)
    with pytest.raises(ConfigError, match="layers of the second summary"):
        drift(a, dataclasses.replace(b, layers=np.array([4])))


def test_divergence_of_loads() -> None:
    p = np.array([0.5, 0.5, 0.0, 0.0])
    assert jensen_shannon(p, p) == 0
    assert jensen_shannon(p, p[::-1]) == pytest.approx(1)
    q = np.array([0.25, 0.25, 0.25, 0.25])
    m = (p + q) / 2
    wanted = sum(x * math.log2(x / y) for r in (p, q) for x, y in zip(r, m) if x > 0) / 2
    assert jensen_shannon(p, q) == pytest.approx(wanted)


def test_likeness_is_that_of_the_formula_and_not_fooled_by_many_experts() -> None:
    rng = np.random.default_rng(0)
    picks = [np.argsort(rng.random((120, 64)), axis=1)[:, :4] for _ in range(2)]
    found = likeness(picks, [64, 64])
    assert found[0, 0] == pytest.approx(1)
    assert abs(found[0, 1]) < 0.1  # the biased form says 0.35
    grams = []
    for ids in picks:
        hot = np.zeros((120, 64))
        for row, picked in enumerate(ids):
            hot[row, picked] = 1
        gram = hot @ hot.T
        grams.append(gram - np.diag(np.diag(gram)))

    def hsic(k: np.ndarray, l: np.ndarray) -> float:
        n, one = len(k), np.ones(len(k))
        terms = np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (terms - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    k, l = grams
    assert found[0, 1] == pytest.approx(hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l)), abs=1e-5)
    all_alike = np.zeros((120, 1), int)
    assert np.isnan(likeness([all_alike, picks[0]], [2, 64])[0]).all()


def test_files(tmp_path: Path) -> None:
    ids, probs, tokens = draw("odd")
    summary = summarize(
        {2: LayerRouting(torch.from_numpy(ids), torch.from_numpy(probs))}, tokens, top_k=3, name="ü", step=9
    )
    path = tmp_path / "routing" / "step-00000009.npz"
    save(path, summary)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert_equal(load(path), summary)
    with pytest.raises(ConfigError, match=r"none\.npz': must be"):
        load(tmp_path / "none.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="damaged"):
        load(path)
    np.savez(path, layers=np.zeros(2))
    with pytest.raises(RunError, match="no routing summary"):
        load(path)


def test_wrong_input_is_named() -> None:
    ids, probs, tokens = draw("plain")
    accumulator = RoutingAccumulator([0, 4], 8, 2)
    with pytest.raises(ConfigError, match=r"layer is 1: must be one of \[0, 4\]"):
        accumulator.add(1, ids, probs, tokens)
    with pytest.raises(ConfigError, match="shapes of ids"):
        accumulator.add(0, ids, probs[:, :7], tokens)
    with pytest.raises(ConfigError, match="shapes of ids"):
        accumulator.add(0, ids, probs, tokens[:5])
    accumulator.add(0, ids, probs, tokens)
    accumulator.add(4, ids, probs, tokens + 1)
    with pytest.raises(ConfigError, match="tokens of layer is 4"):
        accumulator.summary()
    with pytest.raises(ConfigError, match="top_k is 9"):
        RoutingAccumulator([0], 8, 9)


def test_autocast_rounds_no_count() -> None:
    """301 tokens with the same two experts; bf16 has no 301."""
    ids, probs = torch.tensor([[0, 1]] * 301), torch.full((301, 4), 0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        summary = summarize({0: LayerRouting(ids, probs)}, np.zeros(301), top_k=2)
    assert summary.coactivation_LEE[0, 0, 1] == 1
    assert summary.entropy_L[0] == pytest.approx(math.log(4))
