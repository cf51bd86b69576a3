"""Expert parallelism under torch.compile, on real gloo ranks; the cases are in dispatch_compile_worker.py."""

import sys
from pathlib import Path

import pytest
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).parent))
import dispatch_compile_worker


def test_dispatch_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(dispatch_compile_worker.rank_main, (2, str(tmp_path / "store")), nprocs=2)
