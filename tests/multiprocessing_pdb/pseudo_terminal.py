"""A program on a pseudo-terminal, and a person who waits for words and types lines."""

from __future__ import annotations

import os
import pty
import select
import signal
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "multiprocessing_pdb" / "src"
LIMIT = 120.0


def environment(folder: Path, **more: str) -> dict[str, str]:
    """As of a person at a terminal: no CI, nothing of another job."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "RANK", "WORLD_SIZE", "MASTER_PORT")}
    kept = {k: v for k, v in kept.items() if not k.startswith(("MULTIPROCESSING_PDB", "TORCHELASTIC"))}
    return kept | {
        "PYTHONPATH": f"{PACKAGE}:{os.environ.get('PYTHONPATH', '')}",
        "MULTIPROCESSING_PDB_DIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "TERM": "dumb",
        **more,
    }


class Terminal:
    """A program that runs on a terminal of its own."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.text = ""
        self._seen = 0
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execvpe(command[0], list(command), dict(env))

    def expect(self, *words: str) -> str:
        """Wait until one of them is written after what was expected last; returns which."""
        end = time.monotonic() + LIMIT
        while True:
            places = [(self.text.find(word, self._seen), word) for word in words]
            found = min((place for place in places if place[0] >= 0), default=None)
            if found:
                self._seen = found[0] + len(found[1])
                return found[1]
            if time.monotonic() > end or not self._read():
                raise AssertionError(f"none of {words} after {self._seen} of:\n{self.text}")

    def send(self, line: str) -> None:
        os.write(self._fd, line.encode() + b"\n")

    def echoes(self) -> bool:
        """Whether the terminal shows what is typed and edits lines."""
        flags = termios.tcgetattr(self._fd)[3]
        return bool(flags & termios.ECHO) and bool(flags & termios.ICANON)

    def end(self) -> int:
        """Wait for the program; its exit code."""
        end = time.monotonic() + LIMIT
        while self._read():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"it does not end:\n{self.text}")
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 1.0)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # the last process has closed it
            return False
        self.text += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)


def torchrun(ranks: int, script: Path, *options: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, *options, str(script)]
