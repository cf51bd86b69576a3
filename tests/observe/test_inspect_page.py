"""The page of an inspection: its numbers, what is escaped, and how large it may become."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from dmoe.config import ModelConfig, MoEConfig
from dmoe.data import ByteTokenizer, train_bpe
from dmoe.errors import ConfigError
from dmoe.models import Decoder
from dmoe.moe import MoE
from dmoe.observe import plots
from dmoe.observe.inspect import Inspection, Reading, TokenText, inspect_reading, read_text, write_inspection
from dmoe.observe.inspect.details import example_positions, top_pairs
from dmoe.observe.inspect.page import render_page
from dmoe.observe.inspect.pictures import draw
from dmoe.observe.inspect.text import visible
from dmoe.observe.routing import LayerRouting, load, summarize
from dmoe.observe.routing.likeness import likeness

VOID = {"meta", "br", "link", "img", "input", "hr"}
EVIL = ["<script>", "</td>", "&amp;", '"><img src=x>', " a", "b\n", "{{x}}", "c"]


class Page(HTMLParser):
    """Tags, ids and text; checks that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._stack: list[str] = []
        self.feed(text)
        self.close()
        assert not self._stack

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] or "" for name in ("src", "href", "xlink:href") if name in found]
        if tag not in VOID:
            self._stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._stack.pop()

    def handle_endtag(self, tag):
        assert self._stack.pop() == tag

    def handle_data(self, data):
        self.text += data


def evil_text() -> TokenText:
    """A vocabulary of characters that a page must not take as its own."""
    return TokenText(lambda ids: "".join(EVIL[i] for i in ids), lambda text: [7])


def fake(num_layers: int, num_experts: int, top_k: int, tokens: int, vocab: int, seed: int = 0) -> Reading:
    rng = np.random.default_rng(seed)
    ids_T = rng.integers(0, vocab, tokens)
    routing = {}
    for layer in range(num_layers):
        preference = np.random.default_rng(layer).normal(size=(vocab, num_experts)) * 2
        probs = torch.from_numpy(preference[ids_T] + rng.normal(size=(tokens, num_experts))).softmax(-1)
        routing[layer] = LayerRouting(probs.topk(top_k).indices, probs)
    summary = summarize(routing, ids_T, top_k=top_k, name="fake")
    alike = likeness(list(summary.picks_LTK), [num_experts] * num_layers)
    return Reading(summary, ids_T.astype(np.int32), 2.5, np.arange(1, tokens), np.linspace(0, 1, num_layers), alike)


def written(inspection: Inspection, folder: Path) -> Page:
    path = write_inspection(inspection, folder)
    assert path == folder / "inspect.html"
    assert not [file for file in folder.rglob("*") if file.name.startswith(".")]
    return checked(path.read_text(encoding="utf-8"))


def checked(text: str) -> Page:
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    return page


def test_everything_is_there_and_escaped(tmp_path: Path) -> None:
    reading = fake(3, 5, 2, 400, len(EVIL))
    inspection = inspect_reading(
        reading, evil_text(), title="<b>model", model_line="a < b", text_name="<i>text", show=11, other=reading,
        other_title="<u>other",
    )  # fmt: skip
    page = written(inspection, tmp_path / "new" / "folder")
    sections = {"figures", "layers", "drift", "together", "tokens", "experts", "picks", "numbers", "moved"}
    assert sections | {"layer-0", "layer-1", "layer-2"} <= set(page.ids)
    assert not {"b", "u"} & set(page.tags)
    for text in ("<script>", "</td>", "&amp;", "\u2423a", "b\\n", "{{x}}", "<b>model", "<u>other", "a < b", "<i>text"):
        assert text in page.text, text
    folder = tmp_path / "new" / "folder"
    names = {p.stem for p in (folder / "plots").iterdir()}
    pictures = {"load", "entropy", "shares", "confidence", "likeness", "coactivation", "equal_picks", "load_divergence",
                "load_here", "load_there"}  # fmt: skip
    assert names == pictures <= set(page.ids)
    data = json.loads((folder / "inspect.json").read_text(encoding="utf-8"))
    summary = load(folder / "routing.npz")
    np.testing.assert_array_equal(summary.picks_LTK, reading.summary.picks_LTK)
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2]
    for place, layer in enumerate(data["layers"]):
        np.testing.assert_allclose([e["load"] for e in layer["experts"]], summary.load_LE[place], rtol=1e-5)
        first = layer["experts"][3]["tokens"][0]
        token = summary.token_ids_LEN[place, 3, 0]
        assert (first["id"], first["token"]) == (token, visible(EVIL[token]))
    assert data["against"]["layers"][2]["equal_picks"] == 1
    assert data["loss"] == 2.5


@pytest.mark.parametrize(("layers", "experts", "top_k", "tokens"), [(1, 1, 1, 5), (2, 3, 1, 1), (1, 4, 4, 30)])
def test_awkward_models(layers: int, experts: int, top_k: int, tokens: int, tmp_path: Path) -> None:
    reading = fake(layers, experts, top_k, tokens, 4)
    page = written(inspect_reading(reading, evil_text(), title="x", show=0), tmp_path)
    assert "tokens" not in page.ids
    assert "nan" not in page.text.lower().split()
    json.loads((tmp_path / "inspect.json").read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))


def test_a_large_model_makes_a_page_below_5_mb() -> None:
    reading = fake(60, 256, 8, 1000, 300)
    names = TokenText(lambda ids: "".join(f" token{i}" for i in ids), lambda text: [0])
    inspection = inspect_reading(reading, names, title="large", other=reading, other_title="again")
    with plots.style(png=False):
        text = render_page(inspection, draw(inspection))
    page = checked(text)
    assert len(text.encode()) < 5e6
    assert sum(name.startswith("layer-") for name in page.ids) == 12
    assert {"layer-0", "layer-59"} <= set(page.ids)
    assert "224 experts with less load are left out." in page.text


def test_layers_can_be_chosen() -> None:
    reading = fake(4, 5, 2, 40, 8)
    chosen = inspect_reading(reading, evil_text(), title="x", layers=[3, 1], show=2)
    assert [view.layer for view in chosen.layers] == [3, 1]
    token, picks = chosen.shown[1]
    assert token == visible(EVIL[reading.token_ids_T[1]])
    assert picks == [reading.summary.picks_LTK[3, 1].tolist(), reading.summary.picks_LTK[1, 1].tolist()]
    with pytest.raises(ConfigError, match="layers is 4: must be MoE layers of the model: 0, 1, 2, 3"):
        inspect_reading(reading, evil_text(), title="x", layers=[4])


def test_examples_show_the_expert_at_work() -> None:
    reading = fake(2, 5, 2, 400, 8)
    for expert in range(5):
        wanted = reading.summary.token_ids_LEN[1, expert, :3].tolist()
        positions = example_positions(reading, 1, expert)
        assert [reading.token_ids_T[p] for p in positions] == [token for token in wanted if token >= 0]
        assert all(expert in reading.summary.picks_LTK[1, p] for p in positions)
    for one, other, lift, share in top_pairs(reading, 0):
        picks = reading.summary.picks_LTK[0]
        both = np.mean([(one in row) and (other in row) for row in picks.tolist()])
        assert share == pytest.approx(both)
        chance = np.mean(picks == one) * 2 * np.mean(picks == other) * 2 * (1 * 5) / (2 * 4)
        assert lift == pytest.approx(both / chance, rel=1e-5)
        assert lift > 1


def model(vocab_size: int = 257) -> Decoder:
    config = ModelConfig(
        vocab_size=vocab_size, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=32, max_seq_len=32, moe=MoEConfig(num_experts=4, top_k=2, intermediate_size=8),
    )  # fmt: skip
    built = Decoder(config)
    built.init_weights(3)
    return built.eval()


@pytest.mark.parametrize(
    ("tokens", "seq_len", "batch_size"), [(70, 16, 3), (64, 16, 4), (16, 16, 1), (1, 8, 2), (33, 32, 2)]
)
def test_a_text_is_read_once_in_order(tokens: int, seq_len: int, batch_size: int) -> None:
    ids_T, decoder, done = np.random.default_rng(0).integers(0, 257, tokens), model(), []
    reading = read_text(decoder, ids_T, seq_len=seq_len, batch_size=batch_size, progress=done.append)
    assert done[-1] == tokens
    np.testing.assert_array_equal(reading.token_ids_T, ids_T)
    nats, picks = [], []
    router = decoder.layers[1].mlp
    assert isinstance(router, MoE)
    router.router.register_forward_hook(lambda m, a, routing: picks.append(routing.topk_ids_TK))
    for start in range(0, tokens, seq_len):
        ids = torch.from_numpy(ids_T[None, start : start + seq_len])
        with torch.no_grad():
            logp = decoder(ids)[0].double().log_softmax(-1)
        nats += [-logp[i, ids[0, i + 1]].item() for i in range(ids.shape[1] - 1)]
    assert len(reading.predicted_P) == len(nats)
    if nats:
        assert reading.loss == pytest.approx(np.mean(nats), rel=1e-5)
    else:
        assert math.isnan(reading.loss)
    np.testing.assert_array_equal(reading.summary.picks_LTK[1], torch.cat(picks).sort().values.numpy())


def test_bits_per_byte_counts_bytes_of_what_was_predicted() -> None:
    tokens = ByteTokenizer()
    ids_T = np.array([*tokens.encode("naïve text, twice: naïve"), tokens.eos_id, *tokens.encode("more")])
    reading = read_text(model(), ids_T, seq_len=10, batch_size=2)
    view = inspect_reading(reading, TokenText(tokens.decode, tokens.encode), title="x", bytes_V=tokens.token_bytes())
    positions = [t for t in range(len(ids_T)) if t % 10]
    num_bytes = sum(ids_T[t] != tokens.eos_id for t in positions)
    assert view.bits_per_byte == pytest.approx(reading.loss * len(positions) / math.log(2) / num_bytes)


def test_tokens_for_people() -> None:
    bpe = train_bpe(["def alpha(beta):\n    return beta\n"] * 9, 300)
    text = TokenText(bpe.decode, bpe.encode, {bpe.eos_id: "END"})
    ids = bpe.encode("return beta\n\tü")
    shown = [text.show(i) for i in [*ids, bpe.eos_id]]
    assert shown[-1] == "END"
    assert "\u2423beta" in shown
    assert any("\\n" in token for token in shown)
    half = bpe.encode("ü")[0]
    assert text.show(half) in (f"\u27e8{half}\u27e9", "ü")
    snippet = text.snippet(ids, 1, around=1)
    assert snippet.before + snippet.token.replace("\u2423", " ") == "return beta"
    assert visible("\x00\u200b<\\") == "\\x00\\u200b<\\\\"


def test_a_decoder_that_drops_the_first_space_does_not_hide_it() -> None:
    words = ["a", "\u2581the", "\u2581cat", "s"]
    text = TokenText(lambda ids: "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" "), lambda t: [0])
    assert text.show(1) == "\u2423the"
    assert text.show(3) == "s"
    assert text.snippet([1, 2, 3], 1) == (" the", "\u2423cat", "s")
