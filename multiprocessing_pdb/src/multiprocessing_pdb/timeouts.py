"""Keep the other ranks alive while one is stopped: the timeouts of torch's process groups, held and given back.

A rank that waits in a collective for a stopped one has taken its timeout along when it entered. So timeouts are made
long as soon as a debugger exists in a process, for groups that are made later too, and not first when somebody stops.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

HELD = timedelta(days=7)
_POLL_SECONDS = 0.02


class Timeouts:
    """Those of this process. Does nothing until torch.distributed is imported, which it never does itself."""

    def __init__(self) -> None:
        self._before: dict[Any, timedelta] = {}
        self._lock = threading.RLock()
        self._watching = 0

    def hold(self) -> None:
        """Make them long now, and those of groups to come by a thread of its own."""
        self._hold_new()
        with self._lock:
            if self._watching != os.getpid():  # a forked child has not inherited the thread
                self._watching = os.getpid()
                threading.Thread(target=self._watch, name="multiprocessing_pdb timeouts", daemon=True).start()

    def release(self) -> None:
        """Give every group the timeout that it had."""
        with self._lock:
            self._watching = 0
            for group, timeout in self._before.items():
                with contextlib.suppress(Exception):  # the group may be gone
                    _set_timeout(group, timeout)
            self._before.clear()

    def _watch(self) -> None:
        while self._watching == os.getpid():
            with contextlib.suppress(Exception):  # torch may be half imported, or on its way out
                self._hold_new()
            time.sleep(_POLL_SECONDS)

    def _hold_new(self) -> None:
        with self._lock:
            for group in _groups():
                timeout = _timeout(group)
                if group not in self._before and timeout is not None:
                    self._before[group] = timeout
                    _set_timeout(group, HELD)


def _groups() -> list[Any]:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return []
    return list(sys.modules["torch.distributed.distributed_c10d"]._world.pg_map)


def _backends(group: Any) -> list[Any]:
    return [group._get_backend(device) for device in group._device_types]


def _timeout(group: Any) -> timedelta | None:
    for backend in _backends(group):
        with contextlib.suppress(Exception):
            timeout = backend.options._timeout
            if isinstance(timeout, timedelta):
                return timeout
    return None


def _set_timeout(group: Any, timeout: timedelta) -> None:
    sys.modules["torch.distributed.distributed_c10d"]._set_pg_timeout(timeout, group)
