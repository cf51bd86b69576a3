"""The Triton kernels around the experts, in the interpreter."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from interpreted import run_interpreted


def test_sorting_rows_scores_and_topk() -> None:
    run_interpreted("rows_kernel_cases.py", "token_rows_cases.py", "topk_kernel_cases.py")
