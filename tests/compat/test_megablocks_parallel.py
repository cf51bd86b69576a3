"""Expert parallelism of the MegaBlocks interface on real gloo ranks; the cases are in megablocks_parallel_worker.py."""

import sys
from pathlib import Path

import pytest
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).parent))
import megablocks_parallel_worker


def test_expert_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 4 ranks, and of 2 within the 4."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(megablocks_parallel_worker.rank_main, (4, str(tmp_path / "store")), nprocs=4)
