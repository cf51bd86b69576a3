"""Triton kernels on a machine without a GPU: their tests run in Triton's interpreter, in a process of their own.

The interpreter is chosen when a kernel is defined, and for Triton's own functions when Triton is imported, which any
earlier test of the process may have done. So the tests of kernels are in files `*_cases.py`, which pytest does not
collect by itself. A test calls `run_interpreted` on such a file, and one in `tests/gpu/` imports the same tests.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
"""Where the tests of a file of cases put their tensors."""
if DEVICE == "cpu":
    import faster_interpreter

    faster_interpreter.install()


def run_interpreted(cases: str, *arguments: str, timeout: float = 280) -> None:
    """Run the tests of a file of this folder in the interpreter; what fails is shown.

    Args:
        arguments: of pytest, as "-k name".
    """
    if find_spec("triton") is None:
        pytest.skip("needs Triton, which is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--color=no", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    path = Path(__file__).with_name(cases)
    done = subprocess.run(
        [*command, str(path)],
        cwd=path.parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{cases} in the interpreter:\n{done.stdout[-8000:]}"
