"""Keep the other ranks alive while one is stopped: the timeouts of torch's process groups, held and given back.

A rank that waits in a collective for a stopped one has taken its timeout along when it entered. So timeouts are made
long as soon as a debugger exists in a process, for groups that are made later too, and not first when somebody stops.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from datetime import timedelta
from typing import Any

HELD = timedelta(days=7)
_POLL_SECONDS = 0.02


class Timeouts:
    """Those of this process. Does nothing until torch.distributed is imported, which it never does itself."""

    def __init__(self) -> None:
        self._before: dict[Any, timedelta] = {}
        self._forget_thread()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_thread)

    def _forget_thread(self) -> None:
        """There is none yet, or it has stayed in the parent, perhaps with the lock in its hands."""
        self._lock = threading.RLock()
        self._over: threading.Event | None = None

    def hold(self) -> None:
        """Make them long now, and those of groups to come by a thread of its own."""
        self._hold_new()
        with self._lock:
            if self._over is None:
                over = self._over = threading.Event()
                thread = threading.Thread(
                    target=self._watch, args=(over,), name="multiprocessing_pdb timeouts", daemon=True
                )
                thread.start()
                atexit.register(_finish, thread, over)

    def release(self) -> None:
        """Give every group the timeout that it had."""
        with self._lock:
            if self._over is not None:
                self._over.set()
                self._over = None
            for group, timeout in self._before.items():
                with contextlib.suppress(Exception):  # the group may be gone
                    _set_timeout(group, timeout)
            self._before.clear()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_POLL_SECONDS):
            with self._lock, contextlib.suppress(Exception):  # torch may be half imported
                if not over.is_set():
                    self._hold_new()

    def _hold_new(self) -> None:
        with self._lock:
            for group in _groups():
                timeout = _timeout(group)
                if group not in self._before and timeout is not None:
                    self._before[group] = timeout
                    _set_timeout(group, HELD)


def _finish(thread: threading.Thread, over: threading.Event) -> None:
    """A thread that is inside torch while the interpreter goes away ends the process with `terminate called`."""
    if thread.is_alive():
        over.set()
        thread.join()


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
