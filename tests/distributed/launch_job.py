"""A torchrun job in a process of its own, and its ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Job:
    """`torchrun ... -m dmoe.train ...`, with its output in a file. A context manager, which kills what is left."""

    def __init__(self, log: Path, num_ranks: int, arguments: list[str], torchrun: tuple[str, ...] = ()) -> None:
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", f"--nproc_per_node={num_ranks}"]
        command += [*(torchrun or ("--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0")), "-m", "dmoe.train"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with log.open("ab") as file:
            self.process = subprocess.Popen([*command, *arguments], stdout=file, stderr=file, env=environment)

    def rank_process(self, rank: int) -> int:
        """Process id of a rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
        raise AssertionError(f"rank {rank} is not running:\n{self.output()}")

    def wait_for_step(self, run_dir: Path, step: int) -> None:
        """Wait until the metrics of `run_dir` have a step."""
        path = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not (path.exists() and any(s >= step for s in _steps(path))):
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def end(self, seconds: float = 90) -> str:
        """Wait for the end; returns the output."""
        self.process.wait(seconds)
        return self.output()

    def output(self) -> str:
        return self.log.read_text()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


def _steps(path: Path) -> list[int]:
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line)["step"] for line in lines]
