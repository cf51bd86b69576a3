"""Runs that are killed, stopped or damaged go on bit-identically, in real processes.

A fork server that has loaded torch once starts them in a fraction of a second; one test uses `python -m dmoe`.
"""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_run
import torch

from dmoe.checkpoint import capture_rng, load_checkpoint, training_state
from dmoe.cli import main
from dmoe.cli.options import build_config
from dmoe.config import RunConfig
from dmoe.config.overrides import apply_overrides, read_yaml
from dmoe.models import Decoder
from dmoe.train import build_optimizer, train

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")
ROOT = Path(__file__).parents[2]
STEPS = 24


def run_cli(arguments: list[str], log: str, file_limit: int) -> None:
    """Body of a process: the command line with its output in the file `log`."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(arguments, log, file_limit=0) -> the running process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dmoe.train", "torch.distributed.checkpoint.state_dict", "tokenizers"])
    before = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")
    processes = []

    def start(arguments, log, file_limit=0):
        process = context.Process(target=run_cli, args=(arguments, str(log), file_limit))
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(scope="module")
def long(tiny):
    return tiny | {"train.steps": str(STEPS), "checkpoint.every": "2"}


@pytest.fixture(scope="module")
def reference(long, tmp_path_factory):
    """Losses of uninterrupted runs by precision, and their directories."""
    folder = tmp_path_factory.mktemp("reference")
    for precision in ("fp32", "bf16"):
        options = long | {"run_dir": str(folder / precision), "train.precision": precision}
        train(build_config(None, tiny_run.arguments(options)))
        assert set(tiny_run.losses(folder / precision)) == set(range(1, STEPS + 1))
    return folder


def wait_until(condition, process=None, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        assert process is None or process.is_alive(), "the process ended early"
        time.sleep(0.0005)


def is_writing(run_dir: Path) -> bool:
    """Whether a checkpoint is being written: its temporary folder is there."""
    try:
        return any(name.startswith(".tmp-step") for name in os.listdir(run_dir / "checkpoints"))
    except FileNotFoundError:
        return False


def last_step(run_dir: Path) -> int:
    try:
        return (run_dir / "metrics.jsonl").read_bytes().count(b'"kind":"train"')
    except FileNotFoundError:
        return 0


def saved_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and torch's random state in the checkpoint of the last step."""
    config = apply_overrides(RunConfig(), read_yaml(run_dir / "config.yaml"))
    model = Decoder(config.model)
    state = training_state(model, build_optimizer(model, config.optim)) | {"rng": capture_rng()}
    load_checkpoint(run_dir / "checkpoints" / f"step-{STEPS:08d}", state)
    moments = {f"{name}.{key}": t for name, s in state["optimizer"]["state"].items() for key, t in s.items()}
    assert len(moments) > 50
    return state["model"] | moments | {"rng": state["rng"]["rank0"]["torch"]}


def assert_same_end(run_dir: Path, reference: Path) -> None:
    """Same losses at all steps; same weights, optimiser state and random states in the last checkpoint."""
    assert tiny_run.losses(run_dir) == tiny_run.losses(reference)
    ours, theirs = (saved_tensors(folder) for folder in (run_dir, reference))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    evals = [
        [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"kind":"eval"' in line][-1]
        for folder in (run_dir, reference)
    ]
    assert evals[0] == evals[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kill_9_at_any_moment(start, long, reference, tmp_path, precision):
    run_dir = tmp_path / "run"
    options = long | {"run_dir": str(run_dir), "train.precision": precision}
    arguments = ["train", *tiny_run.arguments(options), "--resume"]
    moments = random.Random(precision)
    in_a_write = 0
    for attempt in range(5):
        done_before = last_step(run_dir)
        process = start(arguments, tmp_path / "log")
        wait_until(lambda before=done_before: last_step(run_dir) > before, process)
        if attempt % 2:
            time.sleep(moments.uniform(0, 0.15))
        else:
            # A leftover of the kill before is removed by the first save, so wait for a whole checkpoint, then a write.
            wait_until(lambda before=done_before: last_step(run_dir) > before + 2, process)
            wait_until(lambda: is_writing(run_dir), process)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
        in_a_write += is_writing(run_dir)
        if last_step(run_dir) >= STEPS - 4:
            break
    assert attempt >= 2, "the run was over before it had been killed often enough"
    assert in_a_write >= 1, "no kill hit the writing of a checkpoint"
    tiny_run.resume(run_dir)
    assert "resumed from step" in (tmp_path / "log").read_text()
    assert_same_end(run_dir, reference / precision)
    assert not is_writing(run_dir)


def test_kill_9_of_python_m_dmoe_during_a_checkpoint(long, reference, tmp_path):
    run_dir = tmp_path / "run"
    arguments = ["train", *tiny_run.arguments(long | {"run_dir": str(run_dir)})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "dmoe", *arguments], env=environment, stdout=log, stderr=log)
        wait_until(lambda: last_step(run_dir) >= 5)
        wait_until(lambda: is_writing(run_dir))
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert 5 <= last_step(run_dir) < STEPS
    assert main(["train", "--resume", str(run_dir)]) == 0
    assert_same_end(run_dir, reference / "fp32")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_exits_with_128_plus_it(start, long, reference, tmp_path, signum):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    # No periodic checkpoint: only the signal saves.
    options = long | {"run_dir": str(run_dir), "checkpoint.every": "0"}
    process = start(["train", *tiny_run.arguments(options)], log)
    wait_until(lambda: last_step(run_dir) >= 3, process)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 128 + signum, log.read_text()
    step = last_step(run_dir)
    assert 3 <= step < STEPS
    line = log.read_text().splitlines()[-1]
    assert f"stopped by signal {int(signum)} after step {step}; saved, continue with --resume {run_dir}" in line
    assert "Traceback" not in log.read_text()
    assert tiny_run.checkpoint_names(run_dir) == [f"step-{step:08d}"]
    tiny_run.resume(run_dir)
    assert_same_end(run_dir, reference / "fp32")


def test_full_disk_leaves_the_previous_checkpoint_usable(start, long, reference, tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(reference / "fp32", run_dir)
    newest = run_dir / "checkpoints" / f"step-{STEPS:08d}"
    previous = f"step-{STEPS - 2:08d}"
    limit = newest.joinpath("__0_0.distcp").stat().st_size // 2
    shutil.rmtree(newest)
    process = start(["train", "--resume", str(run_dir)], log, limit)
    process.join(60)
    assert process.exitcode == 1, log.read_text()
    lines = log.read_text().splitlines()
    errors = [line for line in lines if line.startswith("dmoe: error: ")]
    assert errors == [lines[-1]]
    assert f"cannot write checkpoint {newest}" in errors[0]
    assert f"the previous checkpoint {previous} is intact" in errors[0]
    assert "Traceback" not in log.read_text()
    assert previous in tiny_run.checkpoint_names(run_dir)
    assert not is_writing(run_dir)
    tiny_run.resume(run_dir)
    assert_same_end(run_dir, reference / "fp32")
