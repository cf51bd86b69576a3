"""docs/debugging.md: each example's fault is named, with its rank and place, by `dmoe doctor`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "debugging"
OPTIONS = {
    "hang": [],
    "out_of_memory": ["--profiling.memory=true"],
    "nan": [],
    "imbalance": ["--profiling.timeline=true"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each example under torchrun, all at the same time."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DMOE_CACHE": str(folder / "cache")
    }  # fmt: skip
    jobs = {}
    for name, options in OPTIONS.items():
        (folder / name).mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc_per_node=2"]
        command += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", str(EXAMPLES / f"{name}.py")]
        command += ["--run_dir=run", *options]
        with (folder / name / "log").open("wb") as log:
            jobs[name] = subprocess.Popen(command, cwd=folder / name, env=environment, stdout=log, stderr=log)
    done = {}
    for name, job in jobs.items():
        code = job.wait(timeout=240)
        doctor = [sys.executable, "-m", "dmoe", "doctor", "run"]
        said = subprocess.run(doctor, cwd=folder / name, env=environment, capture_output=True, text=True, timeout=100)
        assert said.returncode == 1, (name, said.stdout, said.stderr, (folder / name / "log").read_text())
        done[name] = code, (folder / name / "log").read_text() + said.stdout
    return done


def test_hang(runs: dict[str, tuple[int, str]]) -> None:
    code, text = runs["hang"]
    assert code != 0
    assert "rank 0 called all_reduce [] Float at" in text
    assert "examples/debugging/hang.py:16 (step_and_count); rank 1 called all_gather" in text


def test_out_of_memory(runs: dict[str, tuple[int, str]]) -> None:
    code, text = runs["out_of_memory"]
    assert code != 0
    assert "memory: rank 1: step 1: memory ran out; activations take" in text
    assert "memory: rank 0" not in text


def test_nan(runs: dict[str, tuple[int, str]]) -> None:
    code, text = runs["nan"]
    assert code != 0
    for step in (3, 4):
        assert f"non-finite: step {step}: not finite: rank 1: layers.1.mlp.experts: output has 128 NaN of 16384" in text


def test_imbalance(runs: dict[str, tuple[int, str]]) -> None:
    code, text = runs["imbalance"]
    assert code == 0
    assert "busiest expert 4.00x" in text
    # The other jobs run beside this one, so only where, not by how much.
    assert "straggler: rank 0 keeps the others waiting: in experts" in text
