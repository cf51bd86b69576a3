"""Initial weights do not depend on the layout; the cases are in init_worker.py."""

import sys
from pathlib import Path

from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import init_worker


def test_initial_weights_over_four_ranks(tmp_path: Path) -> None:
    run_ranks(init_worker.rank_main, (4, str(tmp_path)), 4)
