"""Expert parallelism on real gloo ranks against the plain layer in one process; the cases are in dispatch_worker.py."""

import sys
from pathlib import Path

import pytest
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import dispatch_worker


@pytest.mark.parametrize("world", [2, 4])
def test_dispatch(world: int, tmp_path: Path) -> None:
    run_ranks(dispatch_worker.rank_main, (world, str(tmp_path / "store")), world)
