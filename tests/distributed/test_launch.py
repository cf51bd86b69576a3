"""Runs under torchrun: the numbers of one process, one voice, and ranks that die, hang or are stopped."""

from __future__ import annotations

import os
import signal
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import tiny_run
import torch
import torch.distributed as dist

from dmoe.cli.options import build_config
from dmoe.config import ParallelConfig
from dmoe.errors import ConfigError, RunError
from dmoe.observe.metrics_log import read_metrics
from dmoe.train import failures, launch, meeting, train
from dmoe.train.run_lock import RunLock

sys.path.insert(0, str(Path(__file__).parent))
from launch_job import Job
from tiny_run import tiny

__all__ = ["tiny"]
pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in /proc")
STEPS = "16"


@pytest.fixture(scope="module")
def options(tiny: dict[str, str]) -> dict[str, str]:
    return tiny | {"train.steps": STEPS, "train.sample_tokens": "4"}


@pytest.fixture(scope="module")
def alone(options: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    return train(build_config(None, tiny_run.arguments(options | {"run_dir": str(run_dir)}))).run_dir


@pytest.fixture(scope="module")
def undisturbed(options: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run directory, output) of two ranks with the experts spread over them."""
    folder = tmp_path_factory.mktemp("two")
    arguments = tiny_run.arguments(options | {"run_dir": str(folder / "run"), "parallel.ep": "2"})
    with Job(folder / "log", 2, arguments) as job:
        output = job.end()
        assert job.process.returncode == 0, output
    return folder / "run", output


def bits_per_byte(run_dir: Path) -> list[float]:
    return [line["bits_per_byte"] for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "eval"]


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("dmoe: error: ")]


def test_two_ranks_have_the_numbers_of_one(alone: Path, undisturbed: tuple[Path, str]) -> None:
    run_dir, output = undisturbed
    assert tiny_run.losses(run_dir) == pytest.approx(tiny_run.losses(alone), rel=1e-5)
    assert bits_per_byte(run_dir) == pytest.approx(bits_per_byte(alone), rel=1e-5)
    # One voice: each of these lines once, whatever the number of ranks.
    for line in ("2 ranks on cpu; run directory", f"step {STEPS}/{STEPS}  loss", "held-out text: ", "report: "):
        assert output.count(line) == 1, line
    assert f"a sample: dmoe generate {run_dir}" in output
    assert (run_dir / "report.html").exists()
    assert not (run_dir / "sample.txt").exists()


def test_killed_rank_is_named_and_the_restart_goes_on_bit_for_bit(
    options: dict[str, str], undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    extra = {"run_dir": str(run_dir), "parallel.ep": "2", "checkpoint.async_save": "true"}
    torchrun = ("--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--max-restarts=1", "--monitor-interval=0.1")
    with Job(tmp_path / "log", 2, [*tiny_run.arguments(options | extra), "--resume"], torchrun) as job:
        job.wait_for_step(run_dir, 9)
        os.kill(job.rank_process(1), signal.SIGKILL)
        output = job.end()
        assert job.process.returncode == 0, output
    errors = error_lines(output)
    assert len(errors) == 1, output
    assert "rank 1 did not answer: died or hangs; a collective of rank 0 failed in step" in errors[0]
    assert "resumed from step" in output
    assert tiny_run.losses(run_dir) == tiny_run.losses(undisturbed[0])
    assert bits_per_byte(run_dir)[-1] == bits_per_byte(undisturbed[0])[-1]


def test_signal_stops_all_ranks_after_the_same_step(options: dict[str, str], alone: Path, tmp_path: Path) -> None:
    """Four ranks are stopped; two of another layout hang and are ended by the time limit; one finishes."""
    run_dir = tmp_path / "run"
    arguments = tiny_run.arguments(options | {"run_dir": str(run_dir)})
    with Job(tmp_path / "log", 4, [*arguments, "--parallel.pp=2", "--parallel.ep=2", "--resume"]) as job:
        job.wait_for_step(run_dir, 3)
        job.process.send_signal(signal.SIGTERM)
        output = job.end()
    step = max(tiny_run.losses(run_dir))
    assert f"stopped by signal {int(signal.SIGTERM)} after step {step}; saved" in output
    assert tiny_run.checkpoint_names(run_dir)[-1] == f"step-{step:08d}"
    assert not error_lines(output)

    layout = ["--parallel.pp=1", "--parallel.ep=1", "--parallel.timeout_seconds=20"]
    with Job(tmp_path / "log2", 2, [*arguments, *layout, "--resume"]) as job:
        job.wait_for_step(run_dir, step + 5)
        hanging = job.rank_process(1)
        os.kill(hanging, signal.SIGSTOP)
        waited = threading.Event()
        while not error_lines(job.output()):
            assert job.process.poll() is None, job.output()
            waited.wait(0.1)
        os.kill(hanging, signal.SIGKILL)  # torchrun would wait 30 seconds before it does this
        output = job.end()
    assert len(error_lines(output)) == 1, output
    assert "rank 1 did not answer: died or hangs" in error_lines(output)[0]
    assert "20000ms" in output

    tiny_run.resume(run_dir)
    assert close_losses(run_dir) == pytest.approx(tiny_run.losses(alone), rel=1e-5)


def close_losses(run_dir: Path) -> dict[int, float]:
    """Loss by step, of the last time it was done."""
    return {line["step"]: line["loss"] for line in tiny_run.train_lines(run_dir)}


def test_wrong_request_is_one_line(options: dict[str, str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with Job(tmp_path / "log", 2, tiny_run.arguments(options | {"run_dir": str(run_dir), "parallel.ep": "3"})) as job:
        output = job.end()
    assert error_lines(output) == ["dmoe: error: parallel.ep is 3: must be a divisor of dp_shard 2 x cp 1 x tp 1 = 2"]
    assert "exitcode  : 2" in output
    assert not run_dir.exists()


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch):
    """as_rank(r): be rank r of 3 that torchrun started, with a store of an agent."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(failures, "_own_store", store)
    monkeypatch.setattr(failures, "_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(failures, "_FIRST_RANK_SECONDS", 0.2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    return lambda rank: monkeypatch.setenv("RANK", str(rank))


def test_an_error_of_one_rank_carries_its_number(as_rank) -> None:
    as_rank(2)
    assert failures.line_to_print(ConfigError("x is 1")) == "rank 2: x is 1"


def test_an_error_of_all_ranks_is_that_of_the_first(as_rank) -> None:
    as_rank(0)
    assert failures.line_to_print(ConfigError("x is 1")) == "x is 1"
    as_rank(1)
    assert failures.line_to_print(ConfigError("x is 1")) is None
    as_rank(2)
    assert failures.line_to_print(ConfigError("y is 1")) == "rank 2: y is 1"


def test_a_broken_collective_is_reported_by_the_lowest_rank_alive(as_rank) -> None:
    as_rank(1)
    assert failures.others_after_broken_collective(3) == ([0, 2], {})
    as_rank(2)
    assert failures.others_after_broken_collective(3) == ([0], {})
    assert failures.line_to_print(RunError("rank 0 did not answer")) is None
    as_rank(1)
    assert failures.line_to_print(RunError("rank 0 did not answer")) == "rank 0 did not answer"


def test_a_broken_collective_tells_what_another_rank_failed_of(as_rank) -> None:
    as_rank(2)
    failures.leave(MemoryError("17 GB"))
    as_rank(0)
    assert failures.others_after_broken_collective(3) == ([1], {2: "MemoryError: 17 GB"})


def test_a_wrapped_broken_collective_is_found() -> None:
    wrapped = RuntimeError("Failed to run stage backward")
    wrapped.__cause__ = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    assert launch._broken_collective(wrapped) is wrapped.__cause__
    assert launch._broken_collective(RuntimeError("out of memory")) is None


def test_the_time_limit_holds_in_every_group() -> None:
    """A group that is made later has torch's 30 minutes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with launch.limit_waiting(ParallelConfig(timeout_seconds=7.0)):
            inside = dist.new_group(backend="gloo")
        outside = dist.new_group(backend="gloo")
        limits = [group._get_backend(torch.device("cpu")).options._timeout for group in (inside, outside)]
        assert limits == [timedelta(seconds=7), timedelta(minutes=30)]
    finally:
        dist.destroy_process_group()


def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with RunLock() as lock:
        lock.acquire(run_dir)
        with pytest.raises(ConfigError, match=f"must not be in use, and process {os.getpid()} on"):
            RunLock().acquire(run_dir)
    with RunLock() as lock:
        lock.acquire(run_dir)


def test_ranks_meet_beside_what_an_earlier_start_left() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for start in range(2):
        met: dict[int, dist.Store] = {}

        def come(rank: int, met: dict[int, dist.Store] = met) -> None:
            own = dist.TCPStore("127.0.0.1", store.port, is_master=False)
            met[rank] = meeting.meet(own, rank, 3, timedelta(seconds=10))

        threads = [threading.Thread(target=come, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sorted(met) == [0, 1, 2]
        assert not met[1].check(["address"])
        met[0].set("address", f"of start {start}")
        assert met[2].get("address").decode() == f"of start {start}"
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\]"):
        meeting.meet(store, 0, 3, timedelta(seconds=0.5))
