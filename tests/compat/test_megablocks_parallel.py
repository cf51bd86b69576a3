"""Expert parallelism of the MegaBlocks interface on real gloo ranks; the cases are in megablocks_parallel_worker.py."""

import sys
from pathlib import Path

from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import megablocks_parallel_worker


def test_expert_parallel(tmp_path: Path) -> None:
    """Groups of 4 ranks, and of 2 within the 4."""
    run_ranks(megablocks_parallel_worker.rank_main, (4, str(tmp_path / "store")), 4)
