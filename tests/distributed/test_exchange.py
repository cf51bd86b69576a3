"""Exchange of rows and weights on real gloo ranks against a single process; the cases are in exchange_worker.py."""

import sys
from pathlib import Path

import pytest
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import exchange_worker


@pytest.mark.parametrize("world", [2, 4])
def test_exchange(world: int, tmp_path: Path) -> None:
    run_ranks(exchange_worker.rank_main, (world, str(tmp_path / "store")), world)
