"""All-to-all on real gloo ranks against numpy and a single process; the cases are in all_to_all_worker.py."""

import sys
from pathlib import Path

import pytest
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import all_to_all_worker


@pytest.mark.parametrize("world", [2, 4])
def test_all_to_all(world: int, tmp_path: Path) -> None:
    run_ranks(all_to_all_worker.rank_main, (world, str(tmp_path / "store")), world)
