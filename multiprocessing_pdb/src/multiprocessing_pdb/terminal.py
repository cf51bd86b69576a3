"""The terminal that a person sits at, also for processes that a launcher has redirected or put in a new session."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from multiprocessing_pdb.terminate import before_terminating

try:
    import fcntl
    import termios
except ImportError:  # Windows: sockets only
    fcntl = termios = None  # type: ignore[assignment]


def find_terminal() -> str | None:
    """Path of the terminal whose foreground job this process belongs to, or None.

    Looked for among the standard files of this process and of those that it descends from. A job in the background,
    or one that outlived its terminal, has none: it would take keystrokes that are meant for the shell.
    """
    if termios is None:
        return None
    if not Path("/proc/self/stat").exists():
        return next((os.ttyname(fd) for fd in range(3) if os.isatty(fd)), None)
    pid, path = os.getpid(), None
    while pid > 1:
        path = path or _terminal_of(pid)
        status = _status(pid)
        if status is None:
            return None
        parent, group, tty, foreground_group = status
        if tty:  # the nearest process that a terminal controls says who is in front of it
            return path if group == foreground_group else None
        pid = parent
    return None


def _terminal_of(pid: int) -> str | None:
    for fd in range(3):
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/{pid}/fd/{fd}")
            if path.startswith(("/dev/pts/", "/dev/tty")) and os.access(path, os.R_OK | os.W_OK):
                return path
    return None


def _status(pid: int) -> tuple[int, int, int, int] | None:
    """(parent, process group, controlling terminal or 0, its foreground group); see proc_pid_stat(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return int(fields[1]), int(fields[2]), int(fields[4]), int(fields[5])


class Turn:
    """Who speaks on a terminal: one process at a time, by a lock on a file that dies with the process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock: int | None = None

    def try_take(self, key: str) -> bool:
        """Take it unless somebody speaks or it has been promised to another."""
        promised = self._promise()
        if promised is not None and promised != key:
            return False
        lock = os.open(self._folder / "turn.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        self._lock = lock
        with contextlib.suppress(OSError):
            (self._folder / "next").unlink()
        return True

    def give(self, key: str | None = None, seconds: float = 0.0) -> None:
        """Let the next one speak; `key`, if it comes within that time."""
        if self._lock is None:
            return
        if key is not None:
            temporary = self._folder / f"next.{os.getpid()}"
            temporary.write_text(f"{time.time() + seconds} {key}")
            temporary.replace(self._folder / "next")
        os.close(self._lock)
        self._lock = None

    def _promise(self) -> str | None:
        with contextlib.suppress(OSError, ValueError):
            until, key = (self._folder / "next").read_text().split()
            if time.time() < float(until):
                return key
        return None


@contextlib.contextmanager
def standard_files(path: str) -> Iterator[tuple[IO[str], IO[str]]]:
    """(input, output) on the terminal, which take the places of this process's standard input and output meanwhile.

    On the places themselves and not only in `sys`: the library that edits lines reads from file descriptor 0. The
    terminal is sane before and after: it echoes and edits lines.
    """
    terminal = os.open(path, os.O_RDWR | os.O_NOCTTY)
    before = termios.tcgetattr(terminal)
    saved = [_duplicate(fd) for fd in (0, 1)]
    files = sys.stdin, sys.stdout
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    try:
        _make_sane(terminal)
        for fd in (0, 1):
            os.dup2(terminal, fd)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8", "replace")
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), "utf-8", "replace", line_buffering=True)
        with before_terminating(functools.partial(termios.tcsetattr, terminal, termios.TCSANOW, before)):
            yield sys.stdin, sys.stdout
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        sys.stdin, sys.stdout = files
        for fd, copy in enumerate(saved):
            if copy is None:
                os.close(fd)
            else:
                os.dup2(copy, fd)
                os.close(copy)
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, before)
        os.close(terminal)


def _duplicate(fd: int) -> int | None:
    try:
        return os.dup(fd)
    except OSError:  # closed
        return None


def _make_sane(terminal: int) -> None:
    attributes: list[Any] = termios.tcgetattr(terminal)
    attributes[0] |= termios.ICRNL
    attributes[1] |= termios.OPOST
    attributes[3] |= termios.ECHO | termios.ICANON | termios.ISIG
    termios.tcsetattr(terminal, termios.TCSANOW, attributes)
