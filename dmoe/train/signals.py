"""Stopping at the end of a step on SIGINT, SIGTERM or, where it exists, SIGHUP (the terminal was closed)."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

REPEAT_SECONDS = 5.0


class StopRequest:
    """While entered, the first of these signals sets `signum`; a second one acts as usual, unless it is the same and
    comes within seconds: a launcher and a scheduler may both pass it on."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._since = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            hang_up = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
            for signum in (signal.SIGINT, signal.SIGTERM, *hang_up):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._since = signum, time.monotonic()
        elif self._is_second(signum):
            self._restore()
            os.kill(os.getpid(), signum)

    def _is_second(self, signum: int) -> bool:
        # Ctrl-C twice is a person who does not want to wait.
        repeated = signum == self.signum and signum != signal.SIGINT
        return not (repeated and time.monotonic() - self._since < REPEAT_SECONDS)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._previous = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
