"""Where stopped processes find each other: a folder for each job that no other user may read.

A stopped process has a file there that says who and where it is, how to reach it, and the token that it asks for.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stop:
    """A process that waits at a line."""

    key: str
    label: str
    pid: int
    address: str
    """Path of a Unix socket, or 127.0.0.1:port."""
    token: str
    where: str
    """file:line function."""


def root() -> Path:
    """The folder of all jobs of this user. Raises PermissionError if somebody else can read it."""
    base = os.environ.get("MULTIPROCESSING_PDB_DIR") or tempfile.gettempdir()
    return _private(Path(base) / f"multiprocessing_pdb-{os.getuid()}")


def job_folder(job: str) -> Path:
    return _private(root() / job)


def _private(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} must be a folder of yours that nobody else may read (chmod 700)")
    return folder


def announce(job: str, stop: Stop) -> Path:
    """Write a process's file, whole or not at all."""
    path = job_folder(job) / f"{stop.pid}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(stop)))
    temporary.replace(path)
    return path


def stopped(job: str) -> list[Stop]:
    """The processes of a job that wait, ranks in order first. Files of processes that have died are removed."""
    stops = []
    for path in job_folder(job).glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            stop = Stop(**json.loads(path.read_text()))
            if _alive(stop.pid):
                stops.append(stop)
            else:
                path.unlink()
    return sorted(stops, key=lambda stop: (stop.key == str(stop.pid), int(stop.key)))


def jobs() -> Iterator[str]:
    """Names of the jobs in which a process waits."""
    for folder in sorted(root().iterdir()):
        if folder.is_dir() and stopped(folder.name):
            yield folder.name


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
