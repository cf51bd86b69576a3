"""Expert parallelism under torch.compile, on real gloo ranks; the cases are in dispatch_compile_worker.py."""

import sys
from pathlib import Path

from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import dispatch_compile_worker


def test_dispatch_compile(tmp_path: Path) -> None:
    run_ranks(dispatch_compile_worker.rank_main, (2, str(tmp_path / "store")), 2)
