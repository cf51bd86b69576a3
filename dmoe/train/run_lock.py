"""One process at a time writes a run directory."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from types import TracebackType

from dmoe.errors import ConfigError

NAME = ".lock"


class RunLock:
    """A lock on a run directory, which the system lets go of when the process ends, however it ends.

    Use as a context manager, which releases it. Where the file system or the system has no locks there is none.
    """

    def __init__(self) -> None:
        self._file: int | None = None

    def acquire(self, run_dir: Path) -> None:
        """Lock `run_dir`, which is made. Raises ConfigError if another process holds it."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        # What refuses a file here will refuse the run's files, with a better message.
        with contextlib.suppress(OSError):
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(run_dir / NAME, os.O_RDWR | os.O_CREAT, 0o644)
        if self._file is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._file, 200, 0).decode(errors="replace").strip()
            self.release()
            raise ConfigError(f"run_dir is {str(run_dir)!r}: must not be in use, and {holder} trains in it") from None
        except OSError:
            return
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let go of the lock."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
