"""What one layout saves, others load: weights and moments bit for bit, and the next step's loss."""

import sys
from pathlib import Path

from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import resume_worker
from resume_worker import LOADED, SAVED


def test_save_on_one_layout_load_on_others(tmp_path: Path) -> None:

    def launch(world: int, cases: dict, save: bool) -> None:
        run_ranks(resume_worker.rank_main, (world, str(tmp_path), cases, save), world)

    launch(4, {"fsdp 2 x ep 2": SAVED}, True)
    for name, case in LOADED[1].items():
        resume_worker.load_and_compare(name, case.config("fp32"), tmp_path, spread=False)
    for world in (2, 8):
        launch(world, LOADED[world], False)
