"""The parts of the page that come from other files of the run: kept routing, profilers, hangs; and report.json."""

import json
import math

import numpy as np
import pytest
from fake_runs import fake_records, write_run
from fake_tools import (
    WORDS,
    add_hang,
    add_profiling,
    add_routing,
    add_tokenizer,
    memory_summary,
    timeline_summary,
    with_ranks,
)
from test_report import Page, assert_self_contained

from dmoe.cli.report import main
from dmoe.errors import ConfigError
from dmoe.observe.report import write_comparison, write_report
from dmoe.observe.report.compare import compare_figures, config_differences
from dmoe.observe.report.figures import Card
from dmoe.observe.report.routing import equal_picks

SECTIONS = {
    *(
        "ranks",
        "rank_load",
        "ep_imbalance",
        "ep_imbalance_cost",
        "router_confidence",
        "dropped",
        "load-maps",
        "busiest",
    ),
    *("routing", "confidence", "drift_next", "drift_last", "coactivation", "tokens", "profiling", "timeline", "files"),
    *("memory_peak", "memory_phases", "memory_curve", "memory-table", "stragglers", "problems", "dead_experts"),
}


def read(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert_self_contained(page, text)
    return page


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run with everything, its page and its figures."""
    folder = tmp_path_factory.mktemp("runs") / "full"
    records = with_ranks(fake_records(3, 8, 300, eval_every=100))
    for record in records:
        if record["kind"] == "train" and record["step"] > 200:
            record["expert_load"][1][5] = 0.0
    records.append({"kind": "event", "step": 240, "message": "the gradient was not finite first on rank 3"})
    write_run(folder, records, 300, 3, 8)
    add_routing(folder, (100, 200, 300))
    add_tokenizer(folder)
    add_profiling(folder)
    add_hang(folder)
    path = write_report(folder, png=False)
    return folder, records, read(path), json.loads((folder / "report.json").read_text())


def test_every_section_is_there(full):
    folder, _, page, _ = full
    assert set(page.ids) >= SECTIONS
    for href in [value for tag, name, value in page.attributes if tag == "a" and name == "href"]:
        assert (folder / href).is_file()
    assert "first on rank 3" in page.text.split("Learning")[0]
    assert "hang/rank0.txt" in [value for _, name, value in page.attributes if name == "href"]


def test_figures_in_json_are_those_of_the_run(full):
    _, records, page, data = full
    train = [record for record in records if record["kind"] == "train"]
    assert data["figures"]["last_loss"]["value"] == train[-1]["loss"]
    assert data["figures"].keys() == page.cards.keys()
    for key, card in data["figures"].items():
        assert [card["text"], card["note"]] == page.cards[key]
    assert data["train"]["loss"] == {"step": [r["step"] for r in train], "value": [r["loss"] for r in train]}
    assert data["train"]["ep_imbalance_cost"]["value"][-1] == train[-1]["ep_imbalance_cost"]
    experts = data["experts"]
    assert experts["dead"] == [{"layer": 1, "expert": 5, "since_step": 210}]
    assert "expert 5, since step 210" in page.text
    assert experts["window_lines"] == 5
    mean = np.mean([record["expert_load"] for record in train[-5:]], axis=0)
    np.testing.assert_allclose(experts["load_in_window"], mean, atol=1e-6)
    assert experts["layers"][2]["router_confidence"] == train[-1]["router_confidence"][2]
    assert len(experts["load_over_time"]["share"]) == len(experts["load_over_time"]["to_step"]) == len(train)
    np.testing.assert_allclose(data["rank_load"]["share"][-1], train[-1]["rank_load"], atol=1e-5)
    assert data["timeline"]["stragglers"][0]["rank"] == 2


def test_memory_is_compared_with_the_estimate(full):
    _, _, page, data = full
    rows = {row["category"]: row for row in data["memory"]["rows"]}
    assert rows["activations"]["measured"] / rows["activations"]["estimate"] == 4 / 2.5  # rank 1 has the highest peak
    assert rows["total"]["measured"] == 12 * 2**30
    assert rows["total"]["estimate"] == 10.5 * 2**30
    text = page.text[page.text.index("Rank 1, which has the highest peak, beside") :]
    assert "activations4 GiB2.5 GiB1.60" in text
    assert "total12 GiB10.5 GiB1.14" in text


def test_routing_figures(full):
    from dmoe.observe.routing import drift, load

    folder, _, page, data = full
    first, second, last = (load(folder / "routing" / f"step-{step:08d}.npz") for step in (100, 200, 300))
    equal = data["routing"]["equal_picks"]
    np.testing.assert_allclose(
        equal["with_next"], [drift(a, b).equal_picks_L for a, b in ((first, second), (second, last))]
    )
    np.testing.assert_allclose(equal["with_last"][0], drift(first, last).equal_picks_L)
    assert equal["step"] == [100, 200]
    for layer in range(3):
        pair = data["routing"]["pairs"][layer]["pairs"][0]
        assert pair["lift"] == pytest.approx(last.coactivation_lift(layer)[tuple(pair["experts"])])
        picks_TK = last.picks_LTK[layer]
        both = np.mean([set(pair["experts"]) <= set(row) for row in picks_TK.tolist()])
        assert pair["share_of_tokens"] == pytest.approx(both)
    token = data["routing"]["top_tokens"][0]["experts"][0]["tokens"][0]
    assert token["text"] == WORDS[last.token_ids_LEN[0, data["routing"]["top_tokens"][0]["experts"][0]["expert"], 0]]
    assert "\u00b7self" in page.text
    assert "<b>bold" in page.text
    assert "b" not in page.tags


@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_equal_picks_by_sets(tokens):
    rng = np.random.default_rng(tokens)
    experts = 6
    a, b = (np.stack([np.stack([rng.permutation(8)[:3] for _ in range(tokens)] or [np.zeros(3)])[:tokens]] * 2)
            for _ in range(2))  # fmt: skip
    a, b = np.minimum(a, experts).astype(int), np.minimum(b, experts).astype(int)
    want = []
    for p, q in zip(a[0].tolist(), b[0].tolist()):
        p, q = set(p) - {experts}, set(q) - {experts}
        want.append(len(p & q) / max(len(p), len(q)) if p or q else 1.0)
    np.testing.assert_allclose(equal_picks(a, b, experts), [np.mean(want) if want else 1.0] * 2)


def test_damaged_and_foreign_files_leave_the_rest_of_the_page(tmp_path):
    folder = write_run(tmp_path, with_ranks(fake_records(2, 4, 50)), layers=2, experts=4)
    add_profiling(folder)
    add_routing(folder, (10, 20), layers=2, experts=4, tokens=40)
    (folder / "routing" / "step-00000030.npz").write_bytes(b"PK\x03\x04 no archive")
    (folder / "tokenizer.json").write_text("{")
    (folder / "profiling" / "timeline" / "summary.json").write_text(
        '{"step_seconds": [1, 2], "regions": {"data": [1]}}'
    )
    (folder / "profiling" / "memory" / "summary.json").write_text(
        '{"ranks": [{"peak_bytes": 5}, {"rank": 1}], "estimate": 3'
    )
    (folder / "hang").mkdir()
    (folder / "hang" / "rank0.json").write_text("[")
    page = read(write_report(folder, png=False))
    assert {"routing", "timeline", "problems", "tokens"} <= set(page.ids)
    assert "memory_peak" not in page.ids
    assert "step-00000030.npz: is damaged" in page.text
    assert "records of a hang cannot be read" in page.text
    assert str(folder) not in page.text
    assert "#" in page.text[page.text.index("Tokens that experts") :]  # ids, where no tokenizer can be read
    minimal = {"ranks": [{"rank": 0, "peak_bytes": 2**20, "categories": {"weights": 2**20}}], "estimate": None}
    (folder / "profiling" / "memory" / "summary.json").write_text(json.dumps(minimal))
    (folder / "profiling" / "timeline" / "summary.json").write_text("[]")
    page = read(write_report(folder, png=False))
    assert "memory_peak" in page.ids
    assert not {"timeline", "memory_phases", "memory_curve"} & set(page.ids)


def test_many_ranks_draw_the_slowest(tmp_path):
    folder = write_run(tmp_path, fake_records(0, steps=30), layers=0)
    add_profiling(folder)
    for name, summary in (("timeline", timeline_summary(80)), ("memory", memory_summary(80))):
        (folder / "profiling" / name / "summary.json").write_text(json.dumps(summary))
    page = read(write_report(folder, png=False))
    assert "The slowest 40 of 80 ranks" in page.text
    assert "rank 79" in page.text
    assert "The 40 of 80 ranks with the most" in page.text


def test_comparison(tmp_path, capsys):
    a = write_run(tmp_path / "a", with_ranks(fake_records(2, 4, 300, eval_every=100)), 300, 2, 4)
    b = write_run(tmp_path / "b$<i>", with_ranks(fake_records(3, 8, 200, eval_every=100, seed=5)), 200, 3, 8)
    page = read(write_comparison(a, b, png=False))
    data = json.loads((a / "against-b$<i>.json").read_text())
    assert {"loss_by_step", "loss_by_tokens", "loss_by_time", "bits_by_step", "speed", "max_over_mean",
            "router_entropy", "router_confidence", "experts", "config-table"} <= set(page.ids)  # fmt: skip
    assert page.tags.count("img") == 1 + 2 + 3  # the scale, and every layer of each
    figures = {row["key"]: row for row in data["figures"]}
    one, other = (fake_records(*shape)[-1]["loss"] for shape in ((2, 4, 300, 10, 1000), (3, 8, 200, 10, 1000, 5)))
    assert figures["last_loss"]["values"] == [one, other]
    assert figures["last_loss"]["difference"] == pytest.approx(other - one)
    assert figures["last_loss"]["better"] == ("first" if one < other else "second")
    assert [row["name"] for row in data["config"]] == ["model.num_layers", "model.moe.num_experts", "train.steps"]
    assert data["curves"]["loss_by_tokens"][1]["tokens"][-1] == 200 * 4096
    assert data["curves"]["loss_by_time"][0]["seconds"][-1] == pytest.approx(0.23 * 300)
    with pytest.raises(ConfigError, match=r"^run is '.*absent': must"):
        write_comparison(a, tmp_path / "absent")
    assert main([str(a), "--against", str(b), "--json", "--no-png"]) == 0
    assert json.loads(capsys.readouterr().out) == data
    assert not (a / "plots").exists()


def test_comparison_with_a_dense_run_without_config(tmp_path):
    a = write_run(tmp_path / "x" / "run", fake_records(2, 4, 100), 100, 2, 4)
    b = write_run(tmp_path / "y" / "run", fake_records(0, steps=5, log_every=5), 5, 0)
    (b / "config.yaml").unlink()
    page = read(write_comparison(a, b))
    assert "experts" not in page.ids
    assert "y/run" in page.text
    assert (a / "plots" / "against-run" / "loss_by_step.png").stat().st_size > 5000


def test_config_differences_and_figures():
    a = {"seed": 1, "model": {"layers": 2, "moe": {"k": 2}}, "only": None}
    b = {"seed": 1, "model": {"layers": 2.0, "moe": {"k": 3}}, "more": {"deep": [1]}}
    assert config_differences(a, b) == [
        {"name": "model.layers", "values": [2, 2.0]},
        {"name": "model.moe.k", "values": [2, 3]},
        {"name": "only", "values": [None, "absent"]},
        {"name": "more.deep", "values": ["absent", [1]]},
    ]
    assert config_differences(a, a) == []
    loss, mfu = Card("last_loss", "", "2", number=2.0), Card("mfu", "", "0.5", number=0.5)
    rows = compare_figures([loss, mfu], [Card("last_loss", "", "1", number=1.0), Card("mfu", "", "0.4", number=0.4)])
    assert [row["better"] for row in rows] == ["second", "first"]
    assert rows[0]["difference_text"] == "-1 (-50.0%)"
    alone = compare_figures([loss], [mfu])
    assert [row["difference"] for row in alone] == [None, None]
    assert compare_figures([loss], [loss])[0]["better"] == ""


def test_json_on_the_command_line_is_the_file(tmp_path, capsys):
    records = fake_records(1, 4, 40)
    records[-1]["loss"] = math.inf
    folder = write_run(tmp_path / "run", records, 40, 1, 4)
    assert main([str(folder), "--json", "--no-png"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["last_loss"]["value"] is None
    assert sorted(path.name for path in folder.iterdir() if "report" in path.name) == ["report.html", "report.json"]
    assert main([str(folder), "--no-png"]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
