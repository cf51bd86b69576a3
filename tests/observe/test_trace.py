"""Traces of the profiler: which steps are in them, their files, and what an early end leaves.

Those of several ranks are in test_timeline_ranks.py, which launches some.
"""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dmoe.config import ProfilingConfig
from dmoe.errors import ConfigError
from dmoe.observe.trace import StepTrace
from dmoe.ops.regions import _listeners, region

CPU = torch.device("cpu")


def run(watch: StepTrace, steps: range) -> None:
    """Steps whose number is in the trace as a size: step n works on tensors of n + 100 elements."""
    for step in steps:
        watch.begin(step)
        with region("forward"), region("experts"), torch.profiler.record_function(f"work {step}"):
            torch.ones(step + 100).sum()
        watch.end(step)


def load(path: Path) -> dict[str, Any]:
    with gzip.open(path) as file:
        return json.load(file)


def steps_in(path: Path) -> list[int]:
    return [int(e["name"].split()[1]) for e in load(path)["traceEvents"] if str(e.get("name")).startswith("work ")]


def config(**options: Any) -> ProfilingConfig:
    options = {"trace_wait": 2, "trace_warmup": 1, "trace_active": 2} | options
    return ProfilingConfig(trace=True, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "profiling" / "trace").iterdir())


def test_steps_regions_and_files(tmp_path, capsys):
    watch = StepTrace(config(), tmp_path, CPU)
    run(watch, range(11, 18))
    assert _listeners == []
    assert watch._profiler is None  # and with it what it recorded
    watch.close()
    assert names(tmp_path) == ["rank0.json.gz", "rank0_cpu.txt"]
    path = tmp_path / "profiling" / "trace" / "rank0.json.gz"
    assert steps_in(path) == [14, 15]
    trace = load(path)
    assert trace["distributedInfo"] == {"rank": 0, "world_size": 1}
    assert trace["dmoe_first_step"] == 14
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in trace["traceEvents"] if e.get("ph") == "X"}
    outer, inner = spans["dmoe/forward"], spans["dmoe/experts"]
    assert outer[0] <= inner[0] <= inner[1] <= outer[1]
    table = (path.parent / "rank0_cpu.txt").read_text()
    assert "aten::sum" in table
    assert "dmoe/experts" in table
    assert str(path) in capsys.readouterr().err


def test_repeat(tmp_path):
    watch = StepTrace(config(trace_wait=1, trace_repeat=2), tmp_path, CPU)
    run(watch, range(1, 12))
    watch.close()
    folder = tmp_path / "profiling" / "trace"
    assert names(tmp_path) == ["rank0-2.json.gz", "rank0-2_cpu.txt", "rank0.json.gz", "rank0_cpu.txt"]
    assert steps_in(folder / "rank0.json.gz") == [3, 4]
    assert steps_in(folder / "rank0-2.json.gz") == [7, 8]


def test_to_the_end_of_the_run_and_an_end_within_a_recording(tmp_path):
    watch = StepTrace(config(trace_wait=0, trace_active=3, trace_repeat=0), tmp_path, CPU)
    run(watch, range(1, 11))
    watch.begin(11)
    with region("forward"):
        watch.close()  # the run failed in step 11
    assert _listeners == []
    folder = tmp_path / "profiling" / "trace"
    assert [n for n in names(tmp_path) if n.endswith("gz")] == [f"rank0{n}.json.gz" for n in ("-2", "-3", "")]
    assert steps_in(folder / "rank0-2.json.gz") == [6, 7, 8]
    assert steps_in(folder / "rank0-3.json.gz") == [10]


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_end_before_anything_is_recorded(tmp_path, steps):
    watch = StepTrace(config(), tmp_path, CPU)
    run(watch, range(1, steps + 1))
    watch.close()
    recorded = [p for p in tmp_path.rglob("*.json.gz") if steps_in(p)]
    assert recorded == []


def test_device_that_failed_does_not_hide_the_error(tmp_path, monkeypatch, capsys):
    watch = StepTrace(config(trace_wait=0), tmp_path, CPU)
    run(watch, range(1, 3))
    stop = watch._profiler.stop

    def broken() -> None:
        stop()
        raise RuntimeError("device is lost")

    monkeypatch.setattr(watch._profiler, "stop", broken)
    watch.close()
    assert "trace: not written: device is lost" in capsys.readouterr().err


def test_warmup_is_needed():
    with pytest.raises(ConfigError, match=r"profiling.trace_warmup is 0: must be at least 1"):
        ProfilingConfig(trace=True, trace_warmup=0)


def test_nothing_is_timed_while_it_waits(tmp_path):
    watch = StepTrace(config(trace_wait=10**6), tmp_path, CPU)
    start = time.perf_counter()
    run(watch, range(1, 100))
    assert _listeners == []
    assert watch._profiler is None
    assert time.perf_counter() - start < 5
    watch.close()
    assert list(tmp_path.iterdir()) == []
