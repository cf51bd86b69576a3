"""Adapters and frozen parameters on many layouts have the numbers of one process, and a layout loads another's."""

from pathlib import Path

import lora_layout_worker
import torch
from lora_layout_worker import CASES, WORLD, reference, supported
from ranks import run_ranks


def test_layouts_have_the_numbers_of_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    references = {case.reference: case for case in CASES.values() if supported(case)}
    torch.save({key: reference(case) for key, case in references.items()}, tmp_path / "references.pt")
    run_ranks(lora_layout_worker.rank_main, (str(tmp_path),), WORLD)
    assert (tmp_path / "failures").read_text() == ""
