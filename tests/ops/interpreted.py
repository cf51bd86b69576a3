"""Triton kernels on a machine without a GPU: their tests run in Triton's interpreter, in a process of their own.

The interpreter is chosen when a kernel is defined, and for Triton's own functions when Triton is imported, which any
earlier test of the process may have done. So the tests of kernels are in files `*_cases.py`, which pytest does not
collect by itself. A test calls `run_interpreted` on such files, and one in `tests/gpu/` imports the same tests.
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


def run_interpreted(*cases: str, timeout: float = 280) -> None:
    """Run the tests of files of this folder in the interpreter, in one process; what fails is shown."""
    if find_spec("triton") is None:
        pytest.skip("needs Triton, which is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "--color=no"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    here = Path(__file__)
    done = subprocess.run(
        [*command, *(str(here.with_name(name)) for name in cases)],
        cwd=here.parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{' and '.join(cases)} in the interpreter:\n{done.stdout[-8000:]}"
