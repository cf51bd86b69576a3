"""Expert parallelism of several ranks that share one GPU against the plain layer; cases in dispatch_gpu_worker.py."""

import sys
from pathlib import Path

import pytest
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import dispatch_gpu_worker


@pytest.mark.parametrize("world", [2, 4])
def test_dispatch(world: int, tmp_path: Path) -> None:
    run_ranks(dispatch_gpu_worker.rank_main, (world, str(tmp_path / "store")), world)
