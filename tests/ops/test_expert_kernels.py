"""The triton backend of `expert_mlp`, in the interpreter."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from interpreted import run_interpreted


@pytest.mark.timeout(600)
def test_values_autograd_and_picks_of_no_expert() -> None:
    run_interpreted("expert_kernel_cases.py", "expert_autograd_cases.py", "no_expert_cases.py", timeout=570)
