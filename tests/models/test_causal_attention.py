"""`causal_attention` with every option against an explicit softmax in fp64, and the masks against loops."""

import itertools
from typing import Any

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor

from dmoe.models import attention, masks
from dmoe.models.attention import causal_attention
from dmoe.models.masks import Span, spans, visible_keys


def sees(query: int, key: int, *, window: int = 0, chunk: int = 0, valid: list[bool] | None = None) -> bool:
    """The definition, for one pair of positions."""
    start = valid.index(True) if valid and True in valid else len(valid or [])
    if key > query or (window and query - key >= window):
        return False
    if chunk and (key - start) // chunk != (query - start) // chunk:
        return False
    return valid is None or valid[key] or key == query


def oracle(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, sinks_N: Tensor | None = None,
    valid_BU: Tensor | None = None, **cuts: int,
) -> Tensor:  # fmt: skip
    """Softmax over the keys that are seen and the sink, row by row."""
    batch, queries, heads, width = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    scale = width**-0.5 if scale is None else scale
    out = torch.zeros(batch, queries, heads, v.shape[-1], dtype=torch.float64) + 0 * (q.sum() + k.sum() + v.sum())
    for b, s, n in itertools.product(range(batch), range(queries), range(heads)):
        valid = None if valid_BU is None else valid_BU[b].tolist()
        seen = [u for u in range(keys) if sees(keys - queries + s, u, **cuts, valid=valid)]
        usable = [u for u in seen if valid is None or valid[u]]
        logits = [q[b, s, n].double() @ k[b, u, n // group].double() * scale for u in usable]
        if len(usable) < len(seen):  # a padded query also sees itself: a key of zeros
            logits.append(torch.zeros((), dtype=torch.float64))
        if sinks_N is not None:
            logits.append(sinks_N[n].double())
        weights = torch.stack(logits).softmax(0)
        for weight, u in zip(weights, usable):
            out[b, s, n] = out[b, s, n] + weight * v[b, u, n // group].double()
    return out


def inputs(queries: int, keys: int, *, batch: int = 2, heads: int = 4, kv_heads: int = 2) -> dict[str, Tensor]:
    shapes = {"q": (batch, queries, heads, 6), "k": (batch, keys, kv_heads, 6), "v": (batch, keys, kv_heads, 5)}
    return {name: torch.randn(shape, requires_grad=True) for name, shape in shapes.items()}


VALID = torch.tensor([[True] * 9, [False, False, True, True, False, True, True, True, False]])
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # queries, keys, options
    "plain": (9, 9, {}),
    "scale": (9, 9, {"scale": 1.3}),
    "one query": (1, 9, {"window": 3}),
    "one token": (1, 1, {"window": 1, "sinks": True}),
    "window": (9, 9, {"window": 3}),
    "window of one": (9, 9, {"window": 1}),
    "window, blocks": (9, 9, {"window": 3, "block": 2}),
    "window wider than blocks, fewer queries": (5, 9, {"window": 4, "block": 2}),
    "sinks, window, blocks": (9, 9, {"sinks": True, "window": 3, "block": 4}),
    "window as long as the keys": (9, 9, {"window": 9}),
    "window, fewer queries": (5, 9, {"window": 4}),
    "chunk": (9, 9, {"chunk": 4}),
    "chunk that divides": (8, 8, {"chunk": 4}),
    "chunk, fewer queries": (6, 9, {"chunk": 4}),
    "chunk, fewer queries from a border": (5, 9, {"chunk": 4}),
    "sinks": (9, 9, {"sinks": True}),
    "sinks, fewer queries": (4, 9, {"sinks": True, "scale": 0.7}),
    "sinks, window": (9, 9, {"sinks": True, "window": 3}),
    "sinks, chunk": (9, 9, {"sinks": True, "chunk": 5}),
    "padding": (9, 9, {"valid_BU": VALID}),
    "padding, fewer queries": (6, 9, {"valid_BU": VALID}),
    "padding, window, sinks": (9, 9, {"valid_BU": VALID, "window": 2, "sinks": True}),
    "padding, chunk": (9, 9, {"valid_BU": VALID, "chunk": 3}),
    "nothing valid": (9, 9, {"valid_BU": VALID & False, "chunk": 3}),
}


@pytest.mark.parametrize(("queries", "keys", "options"), CASES.values(), ids=CASES)
def test_against_the_formula(queries: int, keys: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(options)
    monkeypatch.setattr(masks, "QUERY_BLOCK", options.pop("block", 1024))
    tensors = inputs(queries, keys)
    if options.pop("sinks", False):
        options["sinks_N"] = torch.randn(4, requires_grad=True)
    got = causal_attention(tensors["q"], tensors["k"], tensors["v"], **options)
    want = oracle(tensors["q"], tensors["k"], tensors["v"], **options)
    assert relative_error(got.detach(), want.detach()) <= 1e-5
    leaves = [*tensors.values(), *([options["sinks_N"]] if "sinks_N" in options else [])]
    grad = torch.randn_like(got)
    for ours, theirs in zip(torch.autograd.grad(got, leaves, grad), torch.autograd.grad(want, leaves, grad.double())):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_sinks_belong_to_query_heads(kv_heads: int) -> None:
    q, k, v = inputs(7, 7, kv_heads=kv_heads).values()
    sinks_N = torch.tensor([-50.0, 0.0, 3.0, 50.0])
    got = causal_attention(q, k, v, sinks_N=sinks_N)
    assert relative_error(got.detach(), oracle(q, k, v, sinks_N=sinks_N).detach()) <= 1e-5
    torch.testing.assert_close(got[:, :, 0], causal_attention(q, k, v)[:, :, 0])
    assert got[:, :, 3].abs().max() < 1e-15


def test_sinks_are_not_rounded_to_the_dtype_of_the_queries() -> None:
    """Logits of 0 and values of 1: n / (n + exp(sink)). Sinks near 8 are 1/16 apart in bf16."""
    q, k, v = (torch.zeros(1, 2000, n, 4, dtype=torch.bfloat16) for n in (4, 1, 1))
    sinks_N = torch.tensor([8.0, 8.03, 7.985, -8.09])
    got = causal_attention(q, k, v + 1, sinks_N=sinks_N)
    assert got.dtype == torch.bfloat16
    want_N = 2000 / (2000 + sinks_N.double().exp())
    assert ((got[0, -1, :, 0].double() - want_N) / want_N).abs().max() <= 2**-8
    rounded_N = 2000 / (2000 + sinks_N.bfloat16().double().exp())
    assert ((rounded_N - want_N) / want_N).abs().max() > 2**-7


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_padding_holds_reaches_nobody(poison: float, sinks: bool) -> None:
    tensors = inputs(9, 9)
    options: dict[str, Any] = {"valid_BU": VALID, "sinks_N": torch.randn(4) if sinks else None}
    clean = causal_attention(*tensors.values(), **options)
    keys = {name: t.detach().masked_fill(~VALID[:, :, None, None], poison) for name, t in tensors.items()}
    keys["q"] = tensors["q"].detach()
    leaves = [t.requires_grad_() for t in keys.values()]
    got = causal_attention(*leaves, **options)
    assert torch.equal(got[VALID], clean[VALID])
    for gradient in torch.autograd.grad(got[VALID].sum(), leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (3, 0), (0, 4)])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (1, 9), (1, 1), (0, 9)])
def test_masks_against_the_definition(queries: int, keys: int, window: int, chunk: int) -> None:
    for valid in (None, VALID[1, :keys]):
        valid_BU = None if valid is None else valid.unsqueeze(0)
        got = visible_keys(queries, keys, torch.device("cpu"), window=window, chunk=chunk, valid_BU=valid_BU)
        flags = None if valid is None else valid.tolist()
        want = torch.tensor(
            [[sees(keys - queries + s, u, window=window, chunk=chunk, valid=flags) for u in range(keys)]
             for s in range(queries)], dtype=torch.bool,
        ).view(queries, keys)  # fmt: skip
        if got is None:
            assert queries == keys
            got = torch.ones(keys, keys, dtype=torch.bool).tril()
        assert torch.equal(got.view(queries, keys), want)


@pytest.mark.parametrize("block", [1, 2, 5])
@pytest.mark.parametrize(("window", "chunk"), [(0, 0), (3, 0), (1, 0), (0, 4), (0, 1)])
def test_spans_hold_what_is_seen_once(window: int, chunk: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "QUERY_BLOCK", block)
    for queries, keys in ((9, 9), (4, 9), (1, 9), (8, 8), (1, 1)):
        cut = spans(queries, keys, window=window, chunk=chunk)
        assert [s.start for s in cut] == [0, *(s.stop for s in cut[:-1])]
        assert cut[-1].stop == queries
        for span in cut:
            for query in range(keys - queries + span.start, keys - queries + span.stop):
                seen = [u for u in range(keys) if sees(query, u, window=window, chunk=chunk)]
                assert span.first_key <= seen[0]
                if chunk:  # the kernel's own causal mask has to do
                    assert span.first_key == seen[0]


def test_what_a_window_and_a_chunk_leave_out_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 tokens: blocks of 8 queries see 11 keys, chunks of 16 see themselves without a mask."""
    monkeypatch.setattr(masks, "QUERY_BLOCK", 8)
    shapes: list[tuple[int, int, bool]] = []
    real = attention.F.scaled_dot_product_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        shapes.append((q.shape[2], k.shape[2], options["attn_mask"] is None))
        return real(q, k, v, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", spy)
    q, k, v = inputs(64, 64).values()
    causal_attention(q, k, v, chunk=16)
    assert shapes == [(16, 16, True)] * 4
    shapes.clear()
    causal_attention(q, k, v, window=4)
    assert shapes == [(8, 8, False)] + [(8, 11, False)] * 7
    shapes.clear()
    causal_attention(q, k, v, window=64, chunk=64)
    causal_attention(q, k, v, sinks_N=torch.zeros(4))
    assert shapes == [(64, 64, True), (65, 65, True)]
    assert spans(64, 64, chunk=64) == [Span(0, 64, 0)]
