"""A folder of finished entries: built under a temporary name, published by rename, never changed afterwards."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dmoe.errors import ConfigError

# Temporary folders older than this are left from builds that were killed.
STALE_SECONDS = 24 * 3600


def open_cache_dir(cache_dir: str) -> Path:
    """The cache folder, made if missing: `cache_dir`, else $DMOE_CACHE, else ~/.cache/dmoe.

    Raises:
        ConfigError: it cannot be made.
    """
    where = cache_dir or os.environ.get("DMOE_CACHE") or "~/.cache/dmoe"
    path = Path(where).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir is {cache_dir!r} (folder {path}): must be a folder that can be written: {error.strerror}"
        ) from None
    return path


@contextmanager
def temporary_folder(cache: Path, key: str) -> Iterator[Path]:
    """A new folder next to the entries, removed afterwards unless it was published. Removes stale ones first."""
    for old in cache.glob(".*.tmp-*"):
        with suppress(FileNotFoundError):  # another process may be removing its own
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    folder = cache / f".{key}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(built: Path, entry: Path, is_whole: Callable[[Path], bool]) -> None:
    """Rename the finished folder `built` to `entry`; if a whole entry is there by now, keep that one.

    A damaged entry is moved away first: two processes that find it at the same time both end with a whole entry.
    """
    while True:
        try:
            os.rename(built, entry)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if is_whole(entry):
            return
        aside = entry.with_name(f".{entry.name}.tmp-damaged-{uuid.uuid4().hex[:8]}")
        try:
            os.rename(entry, aside)
        except FileNotFoundError:
            continue  # another process moved it first
        shutil.rmtree(aside, ignore_errors=True)
