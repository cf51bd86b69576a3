"""Process of test_checkpoint_crash.py: forks writers that die, and checks what they leave."""

import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from dmoe.checkpoint import find_checkpoints, load_latest, save_checkpoint, verify_checkpoint
from dmoe.errors import RunError


def make_state(step: int, size: int) -> dict:
    model = {f"w{i}": torch.arange(size // 4, dtype=torch.float32) + step * 1000 + i for i in range(4)}
    return {"model": model, "trainer": {"step": step}}


def check(run: Path, size: int, at_least: int) -> int:
    """Load the newest checkpoint; it must be whole, not older than `at_least`, and hold what its step says."""
    state = {"model": {f"w{i}": torch.empty(size // 4) for i in range(4)}}
    refused: list[str] = []
    loaded = load_latest(run, state, on_refused=refused.append)
    assert loaded is not None, "no checkpoint is left"
    assert not refused, refused
    step, trainer = loaded
    assert trainer == {"step": step}
    assert step >= at_least, (step, at_least)
    for name, tensor in make_state(step, size)["model"].items():
        assert torch.equal(state["model"][name], tensor), (step, name)
    for path in find_checkpoints(run):  # also the older ones: a half-deleted one must not be listed
        verify_checkpoint(path)
    pointer = run / "checkpoints" / "latest"
    if pointer.exists():
        name = pointer.read_text().strip()
        assert any(p.name in (name, name + ".old") for p in find_checkpoints(run)), f"latest points to {name}"
    return step


def killed_at_random(run: Path) -> None:
    """SIGKILL a process that saves 60 MB in a loop, at random moments."""
    size, step = 15_000_000, 1
    save_checkpoint(run, step, make_state(step, size))
    moments = random.Random(0)
    interrupted = 0
    for _ in range(12):  # until two kills hit a write: how long a write lasts depends on the disk
        if interrupted == 2:
            break
        child = os.fork()
        if child == 0:
            while True:
                step += 1
                save_checkpoint(run, step, make_state(step, size))
        time.sleep(moments.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += any(p.name.startswith(".tmp-step") for p in (run / "checkpoints").iterdir())
        step = check(run, size, step)
    assert interrupted == 2, "the kills missed the writes"
    save_checkpoint(run, step + 1, make_state(step + 1, size))
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert len(names) == 3, names
    assert not any(name.startswith(".tmp") for name in names), names


def killed_at_every_call(run: Path) -> None:
    """Die right before the n-th call that changes the disk, for every n, for a new step and for a replaced one."""
    size = 400
    os.fsync = lambda handle: None  # a kill does not lose what the system has; a fast test can have more cases
    calls = [("os", name) for name in ("rename", "replace", "mkdir", "fsync", "unlink", "rmdir", "open")]
    for saved, step in ((1, 2), (1, 1)):  # a new step; a replaced one that is the only one
        for earlier in range(1, saved + 1):
            save_checkpoint(run / str(saved), earlier, make_state(earlier, size))
        survived, n = False, 0
        while not survived:
            n += 1
            folder = run / f"{saved}-{step}-{n}"
            shutil.copytree(run / str(saved), folder)
            child = os.fork()
            if child == 0:
                arm(calls, n)
                save_checkpoint(folder, step, make_state(step, size), keep=1)
                os._exit(0)
            survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            check(folder, size, saved if not survived else step)
            save_checkpoint(folder, step + 1, make_state(step + 1, size), keep=1)
            assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", f"step-{step + 1:08d}"]
        assert n > 8, f"only {n} points to die at"


def arm(calls: list[tuple[str, str]], n: int) -> None:
    count = 0

    def wrap(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for module, name in calls:
        setattr(sys.modules[module], name, wrap(getattr(sys.modules[module], name)))


def full_disk(run: Path) -> None:
    """A file size limit, which fails a write as a full disk does, at each kind of file that is written."""
    save_checkpoint(run, 1, make_state(1, 400))
    first = find_checkpoints(run)[0]
    sizes = sorted(p.stat().st_size for p in first.iterdir())
    before = {p: p.read_bytes() for p in first.iterdir()}
    # The tensors are the largest file; the next limits stop the metadata, then the manifest, then the values.
    for limit in (100_000, 64, sizes[0] - 1):
        size = 1_000_000 if limit == 100_000 else 400
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            save_checkpoint(run, 2, make_state(2, size))
            raise AssertionError(f"no error with files limited to {limit} bytes")
        except RunError as error:
            message = str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert "File too large" in message, message
        assert f"cannot write checkpoint {run}/checkpoints/step-00000002" in message, message
        assert "the previous checkpoint step-00000001 is intact" in message, message
        assert "\n" not in message, message
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000001"]
        assert {p: p.read_bytes() for p in first.iterdir()} == before
        check(run, 400, 1)
    save_checkpoint(run, 2, make_state(2, 400))
    assert check(run, 400, 2) == 2


CASES = {"random": killed_at_random, "every": killed_at_every_call, "full": full_disk}


def process_main(rank: int, case: str, run: Path) -> None:
    CASES[case](run)
