"""What importing loads, and how long it takes: bounds of the design, measured in new processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

LIGHT = """
import sys
import dmoe
assert dmoe.__version__
from dmoe.cli import main
assert main(["--help"]) == 0
assert main(["--version"]) == 0
assert main(["no-such-verb"]) == 2
import dmoe.errors, dmoe.config
print("LOADED", *sorted(m for m in sys.modules if "." not in m))
"""

LAYER = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
from dmoe import MoE, MoEConfig
seconds = time.perf_counter() - start
loaded = sorted(set(sys.modules) - before)  # before the first call, at which torch loads its compiler by itself
layer = MoE(MoEConfig(hidden_size=8, intermediate_size=4))
assert layer(torch.zeros(3, 8)).shape == (3, 8)
print("SECONDS", seconds)
print("LOADED", *loaded)
"""

HEAVY = {"triton", "transformers", "matplotlib", "tensorboard", "tokenizers", "rich", "jinja2", "tyro", "yaml"}


def run(code: str) -> dict[str, list[str]]:
    """Lines of the output by their first word."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.strip()}


def test_package_and_help_load_neither_torch_nor_anything_heavy():
    loaded = set(run(LIGHT)["LOADED"])
    assert "dmoe" in loaded
    assert not loaded & (HEAVY | {"torch", "numpy"})


def test_layer_is_imported_in_less_than_two_seconds_and_loads_nothing_heavy():
    output = run(LAYER)
    if float(output["SECONDS"][0]) >= 2:  # the machine may have been busy
        output = run(LAYER)
    assert float(output["SECONDS"][0]) < 2
    assert "dmoe.moe" in output["LOADED"]
    assert not set(output["LOADED"]) & HEAVY  # what torch itself loads does not count


def test_unknown_name():
    code = "import dmoe\ntry:\n    dmoe.MoEE\nexcept AttributeError as error:\n    print('ERROR', error)"
    assert "'MoEE'" in run(code)["ERROR"]
