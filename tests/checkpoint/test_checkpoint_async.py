"""Saving in the background: one process here, two ranks in async_worker.py."""

import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.multiprocessing import ProcessExitedException

sys.path.insert(0, str(Path(__file__).parent))
import async_worker

from dmoe.checkpoint import AsyncSaver, find_checkpoints, load_latest, manifest, verify_checkpoint
from dmoe.errors import RunError


def make(scale: float) -> dict:
    model = {"experts.gate_up_proj": torch.full((2, 4, 3), scale), "bf16": torch.full((5,), scale).bfloat16()}
    return {"model": model, "trainer": {"x": [scale]}}


def load(run: Path) -> tuple[int, float]:
    state = make(0.0)
    result = load_latest(run, state, on_refused=pytest.fail)
    assert result is not None
    values = {float(x) for tensor in state["model"].values() for x in tensor.flatten()}
    assert {*values, result[1]["x"][0]} == {min(values)}, "of different times"
    return result[0], min(values)


def test_one_process_saves_while_the_state_changes(tmp_path, monkeypatch):
    gate, describe = threading.Event(), manifest.describe
    monkeypatch.setattr(manifest, "describe", lambda paths: gate.wait(60) and describe(paths))
    state = make(1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with AsyncSaver() as saver:
            saver.save(tmp_path, 1, state)
            for tensor in state["model"].values():
                tensor.zero_()
            state["trainer"]["x"][0] = 0.0
            assert find_checkpoints(tmp_path) == []
            gate.set()
            assert saver.wait() == tmp_path / "checkpoints" / "step-00000001"
            assert saver.wait() is None
            for step in (2, 3):  # into the same copies
                saver.save(tmp_path, step, make(float(step)), keep=1)
    assert load(tmp_path) == (3, 3.0)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000003"]


def save_in_block(run: Path, error: Exception | None = None) -> None:
    with AsyncSaver() as saver:
        saver.save(run, 1, make(1.0))
        if error is not None:
            raise error


def test_a_failure_is_raised_at_the_end_of_the_block_unless_it_hides_another(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot write checkpoint .*: Not a directory"):
        save_in_block(tmp_path / "file")
    with pytest.warns(UserWarning, match="also: cannot write"), pytest.raises(KeyError):
        save_in_block(tmp_path / "file", KeyError())
    with pytest.raises(KeyError):
        save_in_block(tmp_path / "run", KeyError())
    assert load(tmp_path / "run") == (1, 1.0)


def test_two_ranks(tmp_path):
    with pytest.raises(ProcessExitedException) as ended:
        run_ranks(async_worker.rank_main, (tmp_path,), 2)
    assert ended.value.signal_name == "SIGKILL"  # the worker ends so, in the middle of the save of step 5
    for rank in range(2):
        assert (tmp_path / f"killed{rank}").exists()
    root = tmp_path / "checkpoints"
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step-00000004", "step-00000003"]
    assert len(list(root.glob(".tmp-step-00000005-*"))) == 1
    for path in find_checkpoints(tmp_path):
        verify_checkpoint(path)
    state = {"model": {"experts.gate_up_proj": torch.zeros(4, 6, 2), "b": torch.zeros(2)}}
    assert load_latest(tmp_path, state, on_refused=pytest.fail) == (4, {"x": [4.0]})
    assert torch.equal(state["model"]["experts.gate_up_proj"], torch.arange(48.0).reshape(4, 6, 2) * 4)
    with AsyncSaver() as saver:
        saver.save(tmp_path, 5, state)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000004", "step-00000005"]
