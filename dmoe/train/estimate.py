"""The dry run of a run that is going on: in a process of its own, because two process groups cannot live side by side.

python -m dmoe.train.estimate CONFIG.yaml WORLD RESULT.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from dmoe.config import RunConfig, config_to_yaml
from dmoe.train.device import autocast

_WAIT_SECONDS = 300.0
# Of the launcher: the process that plans is no rank of the run.
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class BackgroundEstimate:
    """Plans `config` on `world_size` ranks of the kind of `device`, at low priority, from now on."""

    def __init__(self, config: RunConfig, world_size: int, device: torch.device) -> None:
        self._world_size = world_size
        self._folder = tempfile.TemporaryDirectory(prefix="dmoe-estimate-")
        self._result = Path(self._folder.name) / "result.json"
        precision = "bf16" if autocast(config.train, device)._enabled else config.train.precision
        train = replace(config.train, device=device.type, precision="fp32" if precision == "auto" else precision)
        file = Path(self._folder.name) / "config.yaml"
        file.write_text(config_to_yaml(replace(config, train=train)), encoding="utf-8")
        inherited = {k: v for k, v in os.environ.items() if k not in _NOT_INHERITED and "TORCHELASTIC" not in k}
        path = os.pathsep.join([str(Path(__file__).parents[2]), inherited.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = {**inherited, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "dmoe.train.estimate", str(file), str(world_size), str(self._result)]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def result(self) -> list[dict[str, int]] | None:
        """Bytes by category at the peak of each rank; waits up to five minutes. None with a warning if it failed."""
        try:
            self._process.wait(_WAIT_SECONDS)
            found = json.loads(self._result.read_text())
        except subprocess.TimeoutExpired:
            found = {"error": f"not done {_WAIT_SECONDS:.0f} seconds after the run"}
        except OSError:
            found = {"error": f"the process that planned ended with code {self._process.returncode}"}
        self.cancel()
        if "error" in found:
            warnings.warn(f"no estimate of the memory: {found['error']}", stacklevel=2)
            return None
        stages = found["peaks"]
        return [stages[rank * len(stages) // self._world_size] for rank in range(self._world_size)]

    def cancel(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()


def main(arguments: list[str]) -> int:
    """Plan, and write the peak of each pipeline rank."""
    from dmoe.config.overrides import apply_overrides, read_yaml
    from dmoe.errors import DmoeError
    from dmoe.train.plan import plan

    file, world_size, target = arguments
    os.nice(19)
    try:
        planned = plan(apply_overrides(RunConfig(), read_yaml(Path(file))), int(world_size))
        result: dict[str, object] = {"peaks": [rank.peak for rank in planned.ranks]}
    except DmoeError as error:
        result = {"error": str(error)}
    except Exception as error:  # the run goes on, and its end names this
        result = {"error": f"{type(error).__name__}: {error}"}
    temporary = Path(f"{target}.tmp")
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.replace(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
