"""Processes that are killed while they write, and a disk that fills up. The work is in checkpoint_crash_worker.py."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import checkpoint_crash_worker

from dmoe.checkpoint import find_checkpoints, save_checkpoint
from dmoe.errors import RunError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("case", checkpoint_crash_worker.CASES)
def test_crash(tmp_path, case):
    run_ranks(checkpoint_crash_worker.process_main, (case, tmp_path), 1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("function", ["mkdir", "fsync", "rename"])
def test_any_disk_error_is_one_line(tmp_path, monkeypatch, code, function):
    save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(3)}})

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(RunError) as error:
        save_checkpoint(tmp_path, 2, {"model": {"w": torch.zeros(3)}})
    monkeypatch.undo()
    target = tmp_path / "checkpoints" / "step-00000002"
    expected = f"cannot write checkpoint {target}: {os.strerror(code)}; the previous checkpoint step-00000001 is intact"
    assert str(error.value) == expected
    assert sorted(p.name for p in target.parent.iterdir()) == ["latest", "step-00000001"]


def test_disk_error_after_publishing_says_the_checkpoint_is_whole(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunError, match=r"step-00000001 is whole, but tidying .* failed: No space left on device"):
        save_checkpoint(tmp_path, 1, {"model": {"w": torch.zeros(3)}})
    assert [p.name for p in find_checkpoints(tmp_path)] == ["step-00000001"]
