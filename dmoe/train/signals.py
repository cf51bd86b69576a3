"""Stopping at the end of a step on SIGINT, SIGTERM or, where it exists, SIGHUP (the terminal was closed)."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, the first of these signals sets `signum`; a second one acts as usual."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            hang_up = (signal.SIGHUP,) if hasattr(signal, "SIGHUP") else ()
            for signum in (signal.SIGINT, signal.SIGTERM, *hang_up):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                    self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        self.signum = signum
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._previous = {}

    def __exit__(self, *_: object) -> None:
        self._restore()
