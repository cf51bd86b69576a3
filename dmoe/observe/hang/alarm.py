"""How a rank that hangs tells the others: through the store of the process group, and by a file in the run directory.

The store reaches ranks whose run directory is another disk; the file is there when the process that kept the store is
not.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

_TIMEOUT = timedelta(seconds=5)


class Alarm:
    """Raised and heard by the ranks of one process group; heard by nobody in a single process."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "alarm"
        self._store: Any = None
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        # A connection of our own: the main thread may be waiting in the other.
        with contextlib.suppress(Exception):
            default: Any = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore("dmoe/hang", default.clone())
            self._store.set_timeout(_TIMEOUT)
            self._store.delete_key(f"left/{dist.get_rank()}")

    def state(self) -> tuple[int, int]:
        """Changes when a rank has raised the alarm."""
        count, changed = 0, 0
        if self._store is not None:
            try:
                count = self._store.add("count", 0)
            except Exception:
                self._store = None  # gone with the process that kept it
        with contextlib.suppress(OSError):
            changed = self._file.stat().st_mtime_ns
        return count, changed

    def sound(self) -> bool:
        """Tell the other ranks; whether this rank was the first."""
        first = not self._file.exists()
        if self._store is not None:
            with contextlib.suppress(Exception):
                first = self._store.add("count", 1) == 1
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.touch()
            os.utime(self._file)
        return first

    def leave(self, note: dict[str, Any]) -> None:
        """Note that this rank has left the run."""
        with contextlib.suppress(Exception):
            self._store.set(f"left/{dist.get_rank()}", json.dumps(note))

    def left(self, world_size: int) -> dict[str, dict[str, Any]]:
        """What ranks that have left noted."""
        notes = {}
        for rank in range(world_size):
            with contextlib.suppress(Exception):
                if self._store.check([f"left/{rank}"]):
                    notes[str(rank)] = json.loads(self._store.get(f"left/{rank}"))
        return notes
