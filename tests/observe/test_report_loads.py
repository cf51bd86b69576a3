import json
import struct
import zlib

import numpy as np
import pytest
from fake_runs import fake_records
from matplotlib.image import imread

from dmoe.errors import RunError
from dmoe.observe import plots
from dmoe.observe.report.figures import Experts
from dmoe.observe.report.loads import DEAD_BELOW, LoadHistory, busiest_experts, dead_experts, dead_windows, history
from dmoe.observe.report.run import read_lines
from dmoe.observe.report.tiles import LEVELS, Scale, png


def past_of(load_NLE, steps=None, layers=None):
    load_NLE = np.asarray(load_NLE, dtype=np.float32)
    steps = np.arange(1, len(load_NLE) + 1.0) * 10 if steps is None else np.asarray(steps, dtype=float)
    return LoadHistory(steps, load_NLE, layers or list(range(load_NLE.shape[1])), [{}] * len(load_NLE))


def slow_dead_windows(past):
    """By the words of the definition."""
    w, loads = past.window, past.load_NLE.astype(float)
    out = []
    for end in range(w, len(loads) + 1):
        means = [[np.nanmean(loads[end - w : end, i, e]) if np.isfinite(loads[end - w : end, i, e]).any() else np.nan
                  for e in range(loads.shape[2])] for i in range(loads.shape[1])]  # fmt: skip
        out.append([[m < DEAD_BELOW * np.nanmean(row) for m in row] for row in means])
    return np.array(out)


@pytest.mark.parametrize("lines", [1, 4, 5, 130])
def test_dead_windows_are_those_of_the_definition(lines):
    rng = np.random.default_rng(lines)
    loads = rng.dirichlet(np.ones(5), (lines, 3))
    loads[lines // 3 :, 1, 4] = 0
    loads[: lines // 2, 2, 0] = 0
    loads[::3, 0, 1] = 0  # now and then is not dead
    if lines > 1:
        loads[0, 0, 2] = np.nan
    past = past_of(loads)
    dead = dead_windows(past)
    assert dead.shape == (lines - past.window + 1, 3, 5)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(dead, slow_dead_windows(past))


def test_dead_experts_are_listed_with_their_first_step():
    loads = np.full((100, 2, 4), 0.25)
    loads[60:, 0, 3] = 0  # from the line of step 610 on
    loads[20:50, 1, 2] = 0  # comes back
    loads[:, 1, 0] = 0.0  # never had a token
    past = past_of(loads, layers=[3, 7])
    assert past.window == 5
    dead = dead_experts(past, dead_windows(past))
    assert dead == [{"layer": 3, "expert": 3, "since_step": 610}, {"layer": 7, "expert": 0, "since_step": 10}]
    assert dead_windows(past)[30, 1, 2]
    none_at_all = past_of(np.zeros((3, 1, 2)))  # no token in the layer: nothing is known of its experts
    assert not dead_windows(none_at_all).any()


def test_busiest_experts():
    loads = np.tile(np.array([[0.5, 0.3, 0.2], [0.9, 0.1, 0.0]]), (8, 1, 1))
    loads[-1] = [[0, 0, 1], [0, 0, 1]]  # one line does not make a busy expert
    found = busiest_experts(past_of(loads, layers=["a", "b"]), 2)
    assert [(f["layer"], f["expert"]) for f in found] == [("b", 0), ("a", 0)]
    assert found[0]["share"] == pytest.approx(0.9 * 4 / 5)
    assert found[0]["times_mean"] == pytest.approx(3 * 0.9 * 4 / 5)


def test_history_takes_the_lines_of_the_last_shape(tmp_path):
    lines = ['{"kind":"train","step":1,"expert_load":[[1,0]]}',
             '{"kind":"train","step":2,"expert_load":[[0.5,0.5],[1,null]]}',
             '{"kind":"train","step":3,"expert_load":[[1,0],[0.2]]}', '{"kind":"train","step":4,"expert_load":[]}',
             '{"kind":"train","step":5}']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    past = history(list(read_lines(tmp_path / "metrics.jsonl")))
    assert past.steps_N.tolist() == [2]
    np.testing.assert_array_equal(past.load_NLE, [[[0.5, 0.5], [1, np.nan]]])
    rows = Experts(past).rows
    assert [(row["least"], row["most"]) for row in rows] == [(0.5, 0.5), (1.0, 1.0)]
    assert history([{"step": 1}]) is None


def test_lines_are_read_as_the_metrics_file_is(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = fake_records(2, 4, 60)
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join([*lines[:2], "", *lines[2:]]) + '\n{"kind": "tr')
    read = [
        {key: value.tolist() if hasattr(value, "tolist") else value for key, value in r.items()}
        for r in read_lines(path)
    ]
    for record in records:
        if "expert_load" in record:
            record["expert_load"] = np.array(record["expert_load"], dtype=np.float32).tolist()
    assert read == records
    path.write_text("\n".join([lines[0], "[1]", lines[1]]))
    with pytest.raises(RunError, match=r"line 2 is not a JSON object"):
        list(read_lines(path))
    path.write_bytes(b'{"a":NaN}\n\xff\n')
    assert list(read_lines(path)) == [{"a": None}]


def test_png_is_read_back_by_another_reader(tmp_path):
    scale = Scale(-2, 2, diverging=True)
    values = np.array([[-9.0, -2, 0], [2, np.nan, -np.inf], [1.0, -1.0, 9]])
    content = png(scale.levels(values), scale)
    (tmp_path / "a.png").write_bytes(content)
    pixels = imread(tmp_path / "a.png")
    assert pixels.shape == (3, 3, 4)
    blue, orange = pixels[0, 0], pixels[2, 2]
    assert blue[2] > blue[0]
    assert orange[0] > orange[2]
    assert blue[3] == orange[3] == 1
    np.testing.assert_array_equal(pixels[0, 0], pixels[0, 1])  # beyond the end is the end
    np.testing.assert_array_equal(pixels[0, 0], pixels[1, 2])
    assert pixels[0, 2, 3] == 0  # balance has the colour of the page
    assert 0 < pixels[1, 1, 3] < 1  # not known: grey
    assert np.ptp(pixels[1, 1, :3]) == 0
    assert 0 < pixels[2, 0, 3] < 1
    assert pixels[2, 0, 3] == pytest.approx(pixels[2, 1, 3])
    assert scale.levels(np.array(2.0)) == LEVELS - 1
    # Chunks carry their length and checksum (ISO/IEC 15948, 5.3).
    (length,) = struct.unpack(">I", content[8:12])
    assert struct.unpack(">I", content[16 + length : 20 + length])[0] == zlib.crc32(content[12 : 16 + length])


def test_envelope_keeps_every_extreme_and_the_ends():
    rng = np.random.default_rng(0)
    steps, values = np.arange(5000.0), rng.normal(size=5000)
    values[1234], values[4321], values[100:200] = 50, -50, np.nan
    kept_steps, kept = plots.envelope(steps, values, 100)
    assert len(kept) <= 202
    assert {0.0, 1234.0, 4321.0, 4999.0} <= set(kept_steps)
    np.testing.assert_array_equal(kept, values[kept_steps.astype(int)])
    assert np.isnan(kept[(kept_steps >= 100) & (kept_steps < 150)]).all()
    for start in range(0, 5000, 500):  # the range of every part is that of all its points
        part, drawn = values[start : start + 500], kept[(kept_steps >= start - 50) & (kept_steps < start + 550)]
        assert np.nanmin(drawn) <= np.nanmin(part)
        assert np.nanmax(drawn) >= np.nanmax(part)
    short = plots.envelope(steps[:200], values[:200], 100)
    np.testing.assert_array_equal(short[1], values[:200])


def test_thin_leaves_a_mark_wherever_there_were_some():
    marks = np.concatenate([np.arange(0, 1000.0), [5000.0]])
    kept = plots.thin(marks, 50)
    assert len(kept) <= 50
    assert set(kept) <= set(marks)
    assert kept[0] == 0
    assert kept[-1] == 5000
    np.testing.assert_array_equal(plots.thin(marks[:50], 50), marks[:50])
    assert len(plots.thin(np.zeros(0), 50)) == 0
