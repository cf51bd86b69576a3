import json
import math

import numpy as np
import pytest
import torch

from dmoe.errors import RunError
from dmoe.observe.metrics_log import MetricsWriter, read_metrics

LINES = [{"kind": "train", "step": step, "loss": step / 3, "note": "naïve {}\n"} for step in range(4)]


def test_round_trip_turns_what_is_not_finite_into_null(tmp_path):
    record = {
        "kind": "train", "step": np.int64(3), "loss": math.nan, "lr": torch.tensor(0.5), "up": np.float32("inf"),
        "expert_load": [[0.5, -math.inf], np.array([math.nan, 1.0])], "moe_layers": (0, 1), "ok": True, "text": "ü\n",
    }  # fmt: skip
    with MetricsWriter(tmp_path / "new" / "metrics.jsonl") as writer:
        writer.write(record)
    raw = (tmp_path / "new" / "metrics.jsonl").read_text()
    assert raw.count("\n") == 1
    assert "NaN" not in raw
    assert "Infinity" not in raw
    assert read_metrics(tmp_path / "new" / "metrics.jsonl") == [
        {
            "kind": "train", "step": 3, "loss": None, "lr": 0.5, "up": None, "expert_load": [[0.5, None], [None, 1.0]],
            "moe_layers": [0, 1], "ok": True, "text": "ü\n",
        }
    ]  # fmt: skip


def test_a_line_is_in_the_file_when_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    for i, line in enumerate(LINES):
        writer.write(line)
        assert read_metrics(tmp_path / "metrics.jsonl") == LINES[: i + 1]
    writer.close()


def test_killed_at_any_byte_of_the_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for line in LINES:
            writer.write(line)
    content = path.read_bytes()
    start = content.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(content) + 1):
        path.write_bytes(content[:end])
        whole = LINES if end >= len(content) - 1 else LINES[:-1]
        assert read_metrics(path) == whole
        with MetricsWriter(path) as writer:
            writer.write({"step": 99})
        assert path.read_bytes().count(b"\n") == len(whole) + 1
        assert read_metrics(path) == [*whole, {"step": 99}]


@pytest.mark.parametrize("tail", [b"\0\0\0\0", b'"\xff\xfe', b"[1, 2]\n", b"\n\n", b'{"a": 1}}\n'])
def test_other_broken_tails(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\n' + tail)
    assert read_metrics(path) == [{"step": 1}]
    MetricsWriter(path).close()
    with MetricsWriter(path) as writer:
        writer.write({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_only_a_broken_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"st')
    assert read_metrics(path) == []
    MetricsWriter(path).close()
    assert path.read_bytes() == b""


def test_damage_before_the_last_line_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n{"ste\n{"step":3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2 "):
        read_metrics(path)


def test_nan_written_by_hand_reads_as_none(tmp_path):
    (tmp_path / "m").write_text('{"loss": NaN, "x": [Infinity, -Infinity, 1]}\n')
    assert read_metrics(tmp_path / "m") == [{"loss": None, "x": [None, None, 1]}]


def test_faults_of_the_file_are_run_errors(tmp_path):
    with pytest.raises(RunError, match="cannot open"):
        MetricsWriter(tmp_path)
    with pytest.raises(RunError, match="cannot read"):
        read_metrics(tmp_path / "absent")
    with MetricsWriter(tmp_path / "m") as writer, pytest.raises(TypeError):
        writer.write({"step": object()})
    assert json.loads((tmp_path / "m").read_text() or "null") is None
