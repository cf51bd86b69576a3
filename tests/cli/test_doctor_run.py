"""`dmoe doctor RUN` after real runs: one in which a rank hangs under torchrun, one with a NaN, and a healthy one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run

from dmoe.cli import main
from dmoe.cli.options import build_config
from dmoe.train import train

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).parent / "hanging_train.py"
SHORT = {"train.steps": "3", "train.eval_every": "0", "checkpoint.every": "0"}


def test_rank_that_hangs_under_torchrun(tiny: dict[str, str], tmp_path: Path, capsys) -> None:
    run_dir = tmp_path / "run"
    options = tiny | SHORT | {"run_dir": str(run_dir), "train.steps": "9", "profiling.hang_timeout": "2"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2"]
    command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(SCRIPT), *tiny_run.arguments(options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    log = tmp_path / "log"
    with log.open("wb") as file:
        job = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while [step_of(run_dir, rank) for rank in (0, 1)] != [4, 4]:
            assert job.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
    finally:
        with contextlib.suppress(OSError):  # it may have ended
            ranks = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()  # in sessions of their own
            for pid in (job.pid, *map(int, ranks)):
                os.kill(pid, 9)
        job.wait()
    assert "has not moved for" in log.read_text()
    assert f"dmoe doctor {run_dir} says who is missing" in log.read_text()

    assert main(["doctor", str(run_dir)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("missing: rank 1 did not come to ")
    assert "of the group of all ranks (ranks 0, 1), where rank 0 waits since" in line
    assert f"The main thread of rank 1 is at {SCRIPT}:" in line
    assert "(read_or_hang): `time.sleep(1000)` (step 4, step, in data)" in line
    assert main(["doctor", str(run_dir), "--json"]) == 1
    assert [(f["kind"], f["ranks"]) for f in json.loads(capsys.readouterr().out)] == [("missing", [1])]


def step_of(run_dir: Path, rank: int) -> int | None:
    path = run_dir / "hang" / f"rank{rank}.json"
    return json.loads(path.read_text())["step"] if path.exists() else None


def test_nan_in_a_run(tiny: dict[str, str], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmoe.train import loop

    build = loop.build_engine

    def with_nan(*args, **kwargs):
        engine = build(*args, **kwargs)
        experts = engine.parts[0].layers[1].mlp.experts
        calls = []

        def spoil(module, inputs, output):
            calls.append(0)
            return output * math.nan if 3 <= len(calls) <= 6 else output  # both micro-batches of step 2, and again

        experts.register_forward_hook(spoil)
        return engine

    monkeypatch.setattr(loop, "build_engine", with_nan)
    options = tiny | SHORT | {"run_dir": str(tmp_path / "run"), "profiling.explain_non_finite": "true"}
    run_dir = train(build_config(None, tiny_run.arguments(options))).run_dir
    capsys.readouterr()
    assert main(["doctor", str(run_dir)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("non-finite: step 2: not finite: layers.1.mlp.experts: output has 2048 NaN of 2048 in 64 of")
    assert [record["skipped_steps"] for record in tiny_run.train_lines(run_dir)] == [0, 1, 1]


def test_healthy_run(trained: Path, capsys) -> None:
    assert not (trained / "hang").exists()
    assert main(["doctor", str(trained)]) == 0
    assert capsys.readouterr().out == f"{trained}: nothing wrong was found\n"
    assert main(["doctor", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_requests_that_are_wrong(tmp_path: Path, capsys) -> None:
    for args, wanted in (
        ([str(tmp_path / "none")], "must be a run directory"),
        ([str(tmp_path)], "must be a run directory (one with config.yaml)"),
        (["--json"], "--json is for a run"),
        (["--jsn"], "did you mean --json?"),
    ):
        assert main(["doctor", *args]) == 2
        assert wanted in capsys.readouterr().err


def test_damaged_record(tmp_path: Path, capsys) -> None:
    (tmp_path / "hang").mkdir()
    (tmp_path / "hang" / "rank0.json").write_text("{")
    assert main(["doctor", str(tmp_path)]) == 1
    assert "rank0.json is not a record of a rank" in capsys.readouterr().err
