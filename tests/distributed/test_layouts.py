"""Every layout trains with the numbers of one process; the cases are in layout_cases.py."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))
import layout_cases
import layout_worker


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    """The run of one process for every variant of the model, in both precisions."""
    torch.set_num_threads(1)
    variants = {case.reference: case.alone for cases in layout_cases.CASES.values() for case in cases.values()}
    return {
        precision: {key: layout_cases.run_case(case.config(precision), spread=False) for key, case in variants.items()}
        for precision in ("fp32", "fp64")
    }


def test_the_run_is_hard(references: dict[str, dict[str, Any]]) -> None:
    case = layout_cases.CASES[2]["fsdp 2"]
    first = references["fp64"][case.reference]["metrics"][0]
    per_layer = torch.tensor(first["counts"]).view(2, 8)
    assert (per_layer[:, 6:] == 0).all(), "experts without tokens"
    assert (per_layer[:, :6].amax(1) > 1.5 * per_layer[:, :6].amin(1)).any(), "skew"
    assert first["grad_norm"] > 1, "clipping"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [2, 4, 8])
def test_layouts(world: int, references: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    torch.save(references, tmp_path / "references.pt")
    run_ranks(layout_worker.rank_main, (world, str(tmp_path)), world)
    failures = (tmp_path / "failures").read_text()
    assert not failures, failures
