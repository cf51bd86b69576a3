"""The triton backend of `expert_mlp`, in the interpreter."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from interpreted import run_interpreted


def test_triton_experts() -> None:
    run_interpreted("expert_kernel_cases.py")


def test_triton_experts_under_autograd() -> None:
    run_interpreted("expert_autograd_cases.py")


def test_picks_of_no_expert() -> None:
    run_interpreted("no_expert_cases.py")
