"""The benchmark of the markers runs, counts them, and puts them back."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import profiling_overhead

from dmoe.moe import layer
from dmoe.ops.regions import region

SMALL = {"hidden-size": 16, "layers": 2, "heads": 2, "experts": 4, "expert-width": 8, "seq-len": 8, "micro-batch": 1}


def test_report(tmp_path, capsys):
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    path = tmp_path / "report.json"
    assert profiling_overhead.main([*options, "--device=cpu", "--steps=2", "--warmup=1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    # Data, sync, optimiser; for each of two micro-batches forward, backward, and in each of two layers routing and the
    # experts, forward and backward.
    assert result["markers"] == 3 + 2 * (2 + 2 * 3)
    assert set(result["seconds"]) == {"bare", "off", "timeline"}
    assert all(seconds > 0 for seconds in result["seconds"].values())
    assert 0 < result["marker_seconds"] < 1e-4
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert layer.region is region


def test_no_markers():
    with profiling_overhead.no_markers():
        assert layer.region("forward") is profiling_overhead._EMPTY
    assert layer.region is region
