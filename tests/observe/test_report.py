import json
import re
import statistics
from html.parser import HTMLParser

import numpy as np
import pytest
from fake_runs import fake_records, write_run
from matplotlib.image import imread

from dmoe.errors import ConfigError
from dmoe.observe import plots
from dmoe.observe.report import write_report
from dmoe.observe.report.figures import count, duration, training_seconds
from dmoe.observe.report.loads import time_columns
from dmoe.observe.report.run import last_attempt

pytestmark = pytest.mark.filterwarnings("error")

LEARNING = {"loss", "bits_per_byte", "learning_rate", "grad_norm", "tokens_per_second", "step_time"}
EXPERTS = {"expert_load", "load_imbalance", "router_entropy", "final_load", "aux_loss", "z_loss"}
FILES_ONLY = {"expert_load"}  # the page has the same cells as images of its own
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Ids, tags, attributes and text of a page; the text of each card's value; checks that tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.cards: dict[str, list[str]] = {}
        self._stack: list[str] = []
        self._card = ""
        self._of_card = False
        self.feed(text)
        self.close()
        assert not self._stack

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self._card = found.get("data-card", self._card)
        self._of_card = tag == "p" and found.get("class") in ("value", "note")
        if self._of_card:
            self.cards.setdefault(self._card, []).append("")
        if tag not in VOID:
            self._stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self._stack.pop()

    def handle_endtag(self, tag):
        assert self._stack.pop() == tag
        self._of_card = False

    def handle_data(self, data):
        self.text += data
        if self._of_card:
            self.cards[self._card][-1] += data


def report(folder, png=False):
    path = write_report(folder, png=png)
    assert path == folder / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert_self_contained(page, text)
    assert not [file for file in folder.rglob("*") if file.name.startswith(".")]
    return page


def assert_self_contained(page, text):
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    for tag, name, value in page.attributes:
        if tag == "a" and name == "href":
            assert not value.startswith(("/", "."))  # a file of the run
            assert ":" not in value
        elif name in ("src", "href", "xlink:href", "action", "srcset"):
            assert value.startswith(("#", "data:image/png;base64,"))
    assert len(page.ids) == len(set(page.ids))
    used = re.findall(r"url\(([^)]*)\)", text) + [v for _, n, v in page.attributes if n == "xlink:href" and v[0] == "#"]
    assert {reference.lstrip("#") for reference in used} <= set(page.ids)


def assert_pictures(folder, names):
    assert {path.stem for path in (folder / "plots").iterdir()} == names
    for name in names:
        pixels = imread(folder / "plots" / f"{name}.png")
        assert pixels.shape[1] > 500
        assert (pixels[..., :3].min(axis=2) < 0.9).mean() > 0.005  # something is drawn on the white


def test_every_section_of_a_moe_run_and_its_numbers(tmp_path):
    records = fake_records(6, 8, 300)
    folder = write_run(tmp_path / "my run", records, steps=300)
    page = report(folder, png=True)
    sections = {"figures", "learning", "speed", "experts", "layers", "sample", "reproduce", "config"}
    assert sections | LEARNING | (EXPERTS - FILES_ONLY) <= set(page.ids)
    assert not FILES_ONLY & set(page.ids)
    assert_pictures(folder, LEARNING | EXPERTS)
    for line in ("my run", "finished, 300 steps", "6 MoE layers", "8 experts, top-2",
                 "12.3 M parameters, 5.10 M active",
                 "1.23 M tokens trained", "dmoe train config.yaml --run_dir", "def parse(self, text):",
                 "top_k: 2"):  # fmt: skip
        assert line in page.text

    train = [record for record in records if record["kind"] == "train"]
    last = train[-1]
    final = [record for record in records if record["kind"] == "eval"][-1]
    value = {key: card[0] for key, card in page.cards.items()}
    assert float(value["bits_per_byte"]) == pytest.approx(final["bits_per_byte"], abs=5e-4)
    assert "1.800" in page.cards["bits_per_byte"][1]
    assert float(value["best_loss"]) == pytest.approx(min(r["loss"] for r in train), abs=5e-4)
    assert float(value["last_loss"]) == pytest.approx(last["loss"], abs=5e-4)
    speed = statistics.median(r["tokens_per_second"] for r in train)
    assert float(value["tokens_per_second"].replace(",", "")) == pytest.approx(speed, abs=0.5)
    assert value["time"] == "1 min 9 s"
    assert float(value["mfu"].rstrip("%")) == pytest.approx(100 * statistics.median(r["mfu"] for r in train), abs=0.05)
    worst = int(np.argmax(last["max_over_mean"]))
    assert float(value["imbalance"].rstrip("\u00d7")) == pytest.approx(last["max_over_mean"][worst], abs=5e-3)
    assert page.cards["imbalance"][1].endswith(f"layer {worst}")
    assert value["dead_experts"] == "0"


def test_whole_validation_wins_and_worse_than_zlib_is_said(tmp_path):
    records = fake_records(0, steps=20)
    for step, whole, bits in ((10, True, 2.7), (20, False, 1.1)):
        line = {"kind": "eval", "step": step, "loss": 3.0, "bits_per_byte": bits, "whole": whole}
        records.append(line | {"zlib_bits_per_byte": 1.8})
    page = report(write_run(tmp_path, records))
    assert page.cards["bits_per_byte"] == ["2.700", "zlib -9: 1.800, so 50% more bits"]


def test_dense_run_has_no_experts(tmp_path):
    folder = write_run(tmp_path / "run", fake_records(0, steps=200), steps=1000, layers=0)
    page = report(folder, png=True)
    assert not EXPERTS & set(page.ids)
    assert {"imbalance", "dead_experts"} & set(page.cards) == set()
    assert "expert" not in page.text.replace("num_experts", "").lower()
    assert "6 dense layers" in page.text
    assert "step 200 of 1,000" in page.text
    assert "no validation yet" in page.text
    assert_pictures(folder, LEARNING)


def test_resumed_run_reports_as_if_it_had_not_been_interrupted(tmp_path):
    straight = fake_records(2, 4, 400, eval_every=100)
    other = fake_records(2, 4, 400, eval_every=100, seed=1)
    abandoned = [record for record in other if 200 < record["step"] <= 340]
    resumed = [r for r in straight if r["step"] <= 200] + abandoned + [r for r in straight if r["step"] > 200]
    pages = [write_report(write_run(tmp_path / n / "run", r), png=False) for n, r in (("a", straight), ("b", resumed))]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    # The process that resumed was killed too, at once: what the first one did after step 200 is still void.
    cut = [r for r in straight if r["step"] <= 200] + abandoned + [r for r in straight if r["step"] == 210]
    page = report(write_run(tmp_path / "c", cut))
    assert "step 210 of" in page.text


def test_broken_last_line(tmp_path):
    records = fake_records(2, 4, 100)
    whole = write_report(write_run(tmp_path / "a" / "run", records), png=False)
    folder = write_run(tmp_path / "b" / "run", records)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(records[-1])[:40])
    assert write_report(folder, png=False).read_bytes() == whole.read_bytes()


def _without(records, *keys):
    return [{k: v for k, v in record.items() if k not in keys} for record in records]


def _with_null(records, every):
    """Every n-th train line with null for each number and for an expert's share."""
    out = json.loads(json.dumps(records))
    for record in out[::every]:
        for key, value in record.items():
            if isinstance(value, float):
                record[key] = None
            elif isinstance(value, list) and key != "moe_layers":
                value[0] = [None] * len(value[0]) if isinstance(value[0], list) else None
    return out


AWKWARD = {
    "one_point": fake_records(3, 4, 10),
    "two_points": fake_records(3, 4, 20),
    "one_dense_point": fake_records(0, steps=10),
    "one_layer_one_expert": fake_records(1, 1, 100),
    "every_value_null": _with_null(fake_records(3, 4, 50), 1),
    "some_values_null": _with_null(fake_records(3, 4, 400), 7),
    "eval_only": [record for record in fake_records(3, 4, 500) if record["kind"] == "eval"],
    "null_eval": [{"kind": "eval", "step": 5, "loss": None, "bits_per_byte": None, "whole": False}],
    "bare_lines": [{"kind": "train", "step": 1, "loss": 2.0}, {"kind": "train", "step": 2, "loss": 1.0}],
    "step_zero": [{"kind": "train", "step": 0, "loss": 2.0}, {"kind": "eval", "step": 0, "bits_per_byte": 2.0}],
    "no_layer_names": _without(fake_records(3, 4, 100), "moe_layers", "max_over_mean", "router_entropy"),
    "shape_changed": fake_records(2, 4, 100) + [r | {"step": r["step"] + 100} for r in fake_records(3, 8, 100)],
    "constant": [r | {"loss": 0.0, "grad_norm": 0.0, "lr": 0.0} for r in fake_records(0, steps=100)],
    "all_dead_but_one": [r | {"expert_load": [[1.0, 0.0, 0.0]] * 3} for r in fake_records(3, 3, 50)],
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_runs(tmp_path, name):
    folder = write_run(tmp_path, AWKWARD[name])
    page = report(folder)
    assert "nan" not in page.text.lower().split()
    assert {"loss", "bits_per_byte"} <= set(page.ids)
    assert not (folder / "plots").exists()


def test_loss_that_is_not_finite_at_the_end(tmp_path):
    records = fake_records(0, steps=100)
    records[-1]["loss"] = None
    page = report(write_run(tmp_path, records))
    assert page.cards["last_loss"][0] == "not finite"
    assert float(page.cards["best_loss"][0]) == pytest.approx(min(r["loss"] for r in records[:-1]), abs=5e-4)


def test_metrics_alone_are_enough(tmp_path):
    lines = "".join(json.dumps(record) + "\n" for record in fake_records(2, 4, 50))
    (tmp_path / "metrics.jsonl").write_text(lines)
    page = report(tmp_path)
    assert {"sample", "config", "events"} & set(page.ids) == set()
    (tmp_path / "config.yaml").write_text("a: [1,\n - b: {")
    (tmp_path / "model.json").write_text("[]")
    assert "a: [1," in report(tmp_path).text


def test_everything_from_the_run_is_escaped(tmp_path):
    evil = "<script>alert('&amp;')</script>"
    records = [*fake_records(1, 4, 30), {"kind": "event", "step": 20, "message": evil}]
    folder = write_run(tmp_path / "<b>run", records)
    (folder / "sample.txt").write_text("\n  " + evil)
    (folder / "config.yaml").write_text(f'model: {{num_layers: "{evil}"}}\n')
    page = report(folder)
    # script tags are looked for in `report`; as text the same characters come through unchanged.
    assert page.text.count(evil) == 4
    assert "b" not in page.tags
    assert "<b>run" in page.text
    assert "\n\n  " + evil in page.text  # HTML drops the first line break of <pre>, not the sample's own


def test_a_wrong_run_is_a_config_error_naming_it(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "events").mkdir()
    (tmp_path / "events" / "metrics.jsonl").write_text('{"kind":"event","step":0,"message":"started"}\n{"kind":"tr')
    for name in ("absent", "empty", "events"):
        with pytest.raises(ConfigError, match=rf"^run is '.*{name}': must ") as caught:
            write_report(tmp_path / name)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        assert not (tmp_path / name / "report.html").exists()


def test_last_attempt():
    def line(kind, step, n, whole=False):
        return {"kind": kind, "step": step, "n": n, "whole": whole}

    lines = [line("train", 10, 1), line("eval", 10, 2), line("eval", 10, 3, whole=True), line("train", 20, 4)]
    assert last_attempt([*lines, {"kind": "event", "step": 0}, {"kind": "train"}]) == lines
    again = [*lines, line("eval", 10, 5, whole=True), line("eval", 10, 6)]
    assert [kept["n"] for kept in last_attempt(again)] == [1, 5, 6]
    # A train line makes void a validation of a later step, too.
    assert [kept["n"] for kept in last_attempt([*lines, line("eval", 30, 7), line("train", 20, 8)])] == [1, 2, 3, 8]


def test_training_seconds_over_a_resume():
    assert training_seconds([{"step": i, "elapsed_seconds": s} for i, s in enumerate((5, 9, None, 2, 4))]) == 13
    assert training_seconds([{"step": 0}]) is None


def test_skipped_steps_are_marked_where_the_count_grows():
    totals = [1, 1, 3, 0, 0, None, 2]
    train = [{"step": 10 * i, "skipped_steps": n} for i, n in enumerate(totals)]
    assert plots.skipped_at(train).tolist() == [0, 20, 60]


def test_spikes_leave_the_scale_but_validation_stays():
    steps, values = np.arange(100.0), np.linspace(4, 2, 100)
    values[[50, 70]] = 500, np.nan
    ax = plots.new_figure().add_subplot()
    ax.plot(steps, values)
    plots._limit_spikes(ax, steps, values, beside=np.array([np.nan, 9.0]))
    low, high = ax.get_ylim()
    assert 1.5 < low < 2
    assert high == 9
    assert np.asarray(ax.lines[-1].get_xdata()).tolist() == [50]
    calm = plots.new_figure().add_subplot()
    plots._limit_spikes(calm, steps, np.linspace(4, 2, 100))
    assert not calm.lines


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40, 1001])
def test_smooth_is_the_running_median(size):
    values = np.random.default_rng(size).normal(size=size)
    half = min(max(size // 40, 2), 50)
    want = []
    for i in range(size):
        reach = min(half, i, size - 1 - i)
        want.append(np.median(values[i - reach : i + reach + 1]))
    np.testing.assert_array_equal(plots.smooth(values), want)
    holed = np.insert(values, size // 2, np.nan)
    assert np.isnan(plots.smooth(holed)[size // 2])
    np.testing.assert_array_equal(np.delete(plots.smooth(holed), size // 2), want)


def test_heat_map_columns_are_means_of_their_lines():
    rng = np.random.default_rng(0)
    loads = rng.dirichlet(np.ones(4), (480, 3))
    steps = np.arange(1, 481.0)
    columns, ends = time_columns(steps, loads)
    assert columns.shape == (240, 3, 4)
    np.testing.assert_allclose(columns.sum(-1), 1)
    edges = np.linspace(1, 480, 241)
    inside = (steps >= edges[7]) & (steps < edges[8])
    np.testing.assert_allclose(columns[7], loads[inside].mean(0))
    np.testing.assert_allclose(ends, edges[1:])
    np.testing.assert_array_equal(time_columns(steps[:1], loads[:1])[0], loads[:1])
    # Logged every step, then every hundredth: no column of the sparse part is left empty.
    sparse = np.concatenate([np.arange(1, 100.0), [200.0, 300.0, 1000.0]])
    assert np.isfinite(time_columns(sparse, loads[: len(sparse)])[0]).all()


def test_numbers_for_people():
    assert [count(n) for n in (7, 999, 1_000, 12_345_678, 123_456_789, 999_999, 7e9)] == [
        "7", "999", "1.00 k", "12.3 M", "123 M", "1000 k", "7.00 B",
    ]  # fmt: skip
    assert [duration(s) for s in (None, 3.14159, 119.7, 3599, 7261)] == [
        "\u2013", "3.14 s", "2 min 0 s", "59 min 59 s", "2 h 1 min",
    ]  # fmt: skip
