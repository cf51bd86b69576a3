"""The benchmark of packed weights runs, compares results, and reports every way."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import packed_cpu

from dmoe.bench.inputs import Shape
from dmoe.ops import packed


def test_report(tmp_path, capsys):
    threads, path = torch.get_num_threads(), tmp_path / "report.json"
    arguments = ["--shapes", "tiny", "--tokens", "1", "9", "--rounds", "1", "--threads", str(threads)]
    assert packed_cpu.main([*arguments, "--json", str(path)]) == 0
    results = json.loads(path.read_text())["results"]
    assert [(r["dtype"], r["shape"]["tokens"]) for r in results] == [("fp32", 1), ("fp32", 9), ("bf16", 1), ("bf16", 9)]
    assert all(seconds > 0 for r in results for seconds in r["seconds"].values())
    assert {"torch", "loop", "grouped_mm"} <= results[0]["seconds"].keys()
    if packed.why_not_packed(torch.empty(1, 1, 1)) is None:
        assert {"packed", "onednn"} <= results[0]["seconds"].keys()
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_wrong_result_is_no_result(monkeypatch):
    monkeypatch.setattr(packed_cpu, "grouped_mm", lambda x, *_: x)
    with pytest.raises(AssertionError, match="grouped_mm: relative error"):
        packed_cpu.time_ways(Shape("tiny", *packed_cpu.SHAPES["tiny"], 4), torch.float32, 1)
