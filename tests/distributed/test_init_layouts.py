"""Initial weights do not depend on the layout; the cases are in init_worker.py."""

import sys
from pathlib import Path

import pytest
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).parent))
import init_worker


def test_initial_weights_over_four_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(init_worker.rank_main, (4, str(tmp_path)), nprocs=4)
