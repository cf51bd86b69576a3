"""The watch of one process, and what else `dmoe doctor RUN` reads."""

from __future__ import annotations

import ctypes
import json
import shutil
import threading
import time
from pathlib import Path

import pytest

from dmoe.config import ProfilingConfig
from dmoe.observe.hang import HangWatch, watch
from dmoe.observe.hang.record import clear, read_records
from dmoe.observe.hang.run_findings import memory_findings, non_finite_findings, straggler_findings
from dmoe.ops.regions import region


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_stacks_of_all_threads_and_region(tmp_path: Path) -> None:
    parked = threading.Event()
    other = threading.Thread(target=parked.wait, name="loader", daemon=True)
    other.start()
    path = tmp_path / "hang" / "rank0.json"
    with HangWatch(ProfilingConfig(hang_timeout=0.2), tmp_path) as hang_watch:
        hang_watch.begin(7)
        with region("forward"), region("experts"):
            wait_for(path)
            record = json.loads(path.read_text())
        hang_watch.end(7)
        first = path.stat().st_mtime_ns
        while json.loads(path.read_text())["state"] != "went on":
            assert time.time_ns() < first + 20e9
            time.sleep(0.02)
    parked.set()
    assert (record["step"], record["phase"], record["region"]) == (7, "step", "forward > experts")
    assert record["seconds"] >= 0.2
    main, *others = record["threads"]
    assert main["main"]
    assert [f["function"] for f in main["frames"]][-2:] == ["test_stacks_of_all_threads_and_region", "wait_for"]
    assert main["frames"][-1]["code"] in ("time.sleep(0.02)", "while not path.exists():")
    assert any(thread["name"] == "loader" for thread in others)
    assert not any(thread["name"] == "hang watch" for thread in others)


def test_writes_again_after_each_timeout(tmp_path: Path) -> None:
    path = tmp_path / "hang" / "rank0.json"
    with HangWatch(ProfilingConfig(hang_timeout=0.2), tmp_path):
        wait_for(path)
        first = json.loads(path.read_text())
        assert first["phase"] == "set-up"
        deadline = time.monotonic() + 20
        while json.loads(path.read_text())["seconds"] < first["seconds"] + 0.15:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_nothing_is_written_while_something_moves(tmp_path: Path) -> None:
    with HangWatch(ProfilingConfig(hang_timeout=2.0), tmp_path) as hang_watch:
        hang_watch.begin(1)
        for _ in range(30):
            time.sleep(0.1)
            with region("forward"):
                pass
        hang_watch.close()
    assert not (tmp_path / "hang").exists()


def test_timeout_of_0_watches_nothing(tmp_path: Path) -> None:
    threads = threading.active_count()
    with HangWatch(ProfilingConfig(hang_timeout=0.0), tmp_path) as hang_watch:
        hang_watch.begin(1)
        assert threading.active_count() == threads
        hang_watch.end(1)
        hang_watch.close()
    assert not any(tmp_path.iterdir())


def test_python_s_lock_is_held(tmp_path: Path) -> None:
    """No thread of Python can run: the stack is faulthandler's."""
    with HangWatch(ProfilingConfig(hang_timeout=0.4), tmp_path) as hang_watch:
        hang_watch.begin(1)
        time.sleep(0.3)  # the watch has looked once
        ctypes.PyDLL(None).sleep(2)
        hang_watch.end(1)
        shutil.copytree(tmp_path / "hang", tmp_path / "kept" / "hang")
    (tmp_path / "kept" / "hang" / "rank0.json").unlink(missing_ok=True)
    record = read_records(tmp_path / "kept")[0]
    assert record["held_lock"]
    assert record["threads"][0]["frames"][-1]["function"] == "test_python_s_lock_is_held"


def test_abort_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    codes = []
    monkeypatch.setattr(watch, "_ABORT_GRACE", 0.1)
    monkeypatch.setattr(watch.os, "_exit", codes.append)
    with HangWatch(ProfilingConfig(hang_timeout=0.2, hang_abort=True), tmp_path) as hang_watch:
        hang_watch.begin(3)
        deadline = time.monotonic() + 20
        while not codes:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not (tmp_path / "hang" / "rank0.locked.txt").exists()
    assert codes[0] == 1
    assert "error: rank 0 has not moved for" in capsys.readouterr().err
    assert (tmp_path / "hang" / "rank0.json").exists()


def test_records_of_an_earlier_start_are_put_away(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        (tmp_path / f"rank{rank}.json").write_text("{}")
    (tmp_path / "alarm").touch()
    clear(tmp_path, 1, 2)
    assert sorted(p.name for p in (tmp_path / "earlier").iterdir()) == ["rank1.json"]
    clear(tmp_path, 0, 2)
    assert sorted(p.name for p in (tmp_path / "earlier").iterdir()) == ["rank0.json", "rank1.json", "rank2.json"]
    assert not (tmp_path / "alarm").exists()


def test_stragglers() -> None:
    summary = {
        "ranks": 2,
        "step_seconds": [0.1, 0.1],
        "stragglers": [
            {"rank": 1, "seconds_behind": 0.02, "region": "forward", "steps": 10},
        ],
    }
    (finding,) = straggler_findings(summary)
    assert (finding.kind, finding.ranks) == ("straggler", (1,))
    wanted = "rank 1 keeps the others waiting: in forward it was 20.0 ms behind, 20% of a step, in each of 10 steps."
    assert finding.message == wanted


def test_events_that_are_not_finite() -> None:
    explained = {"kind": "event", "step": 4, "message": "not finite: rank 3: layers.0.mlp: output has 1 NaN of 4"}
    resumed = {"kind": "event", "step": 9, "message": "resumed from step 8"}
    skipped = {"kind": "train", "step": 10, "skipped_steps": 1}
    (finding,) = non_finite_findings([explained, resumed, skipped])
    assert finding.ranks == (3,)
    assert finding.message == f"step 4: {explained['message']}"
    (finding,) = non_finite_findings([resumed, skipped])
    assert finding.message.startswith("1 steps were skipped")
    assert non_finite_findings([resumed]) == []


def test_memory_that_ran_out(tmp_path: Path) -> None:
    folder = tmp_path / "profiling" / "memory"
    folder.mkdir(parents=True)
    (folder / "rank0.json").touch()
    assert memory_findings(tmp_path) == []
    (folder / "oom_rank2.pickle").touch()
    (folder / "oom_rank3.json").write_text(json.dumps({"message": "step 4: memory ran out; experts take 9 MiB"}))
    (folder / "oom_rank3.txt").touch()
    without, told = memory_findings(tmp_path)
    assert without.ranks == (2,)
    assert without.message == f"rank 2: memory ran out; what held it: {folder / 'oom_rank2.pickle'}"
    assert told.message == "rank 3: step 4: memory ran out; experts take 9 MiB"
