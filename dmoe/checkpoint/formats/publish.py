"""A folder that appears whole or not at all: written beside its place under another name and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dmoe.errors import ConfigError, RunError


def check_destination(path: Path, overwrite: bool) -> None:
    """Raise ConfigError where something is that must not be replaced."""
    if path.is_dir() and (overwrite or not any(path.iterdir())):
        return
    if path.exists() or path.is_symlink():
        wanted = "a folder" if overwrite else "new or an empty folder; --overwrite replaces it"
        raise ConfigError(f"destination is {str(path)!r}: must be {wanted}")


@contextmanager
def published(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that takes the name `path` when the block ends, and is removed if it fails.

    Its name is ".NAME.tmp-PID"; what a killed process left under such a name is removed by the next one.

    Raises:
        ConfigError: `path` exists; see `check_destination`.
        RunError: the disk refuses.
    """
    path = Path(os.path.abspath(path))
    check_destination(path, overwrite)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        temporary.mkdir()
        try:
            yield temporary
            _replace(temporary, path)
        except BaseException:  # Ctrl-C too
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def _replace(temporary: Path, path: Path) -> None:
    old = None
    if path.is_dir():
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        if old is not None:
            os.rename(old, path)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(path: Path) -> None:
    from dmoe.checkpoint.save import _is_running

    for other in path.parent.glob(f".{path.name}.*-*"):
        kind, _, pid = other.name.removeprefix(f".{path.name}.").partition("-")
        superseded = kind == "tmp" or (kind == "old" and path.exists())
        if superseded and pid.isdigit() and not _is_running(pid):
            shutil.rmtree(other, ignore_errors=True)
