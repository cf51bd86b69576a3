"""Put the terminal right before SIGTERM ends a process that edits a line on it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

_AGAIN_SECONDS = 0.05


@contextlib.contextmanager
def before_terminating(restore: Callable[[], object]) -> Iterator[None]:
    """Call `restore` when SIGTERM comes, and then do what the process would have done.

    Python runs a handler when the library that edits lines is interrupted in its wait for a key. A signal that comes
    just before that wait interrupts nothing, and would be noticed at the next key; so a thread, which hears of it at
    once, sends it again until the handler has run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    lock, done = threading.RLock(), False
    main = threading.get_ident()

    def end(number: int, _frame: FrameType | None) -> None:
        nonlocal done
        with lock:
            first, done = not done, True
        if first:
            restore()
            signal.signal(number, before)
            os.kill(os.getpid(), number)

    def send_again() -> None:
        while True:
            with lock:
                if done:
                    return
                signal.pthread_kill(main, signal.SIGTERM)
            time.sleep(_AGAIN_SECONDS)

    before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    signal.signal(signal.SIGTERM, end)
    try:
        with _on_signal(signal.SIGTERM, send_again):
            yield
    finally:
        with lock:  # first the handler: one that is due still has to run
            signal.signal(signal.SIGTERM, before)
            done = True


@contextlib.contextmanager
def _on_signal(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Call it in a thread when the signal comes, whatever the main thread is in."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    previous = signal.set_wakeup_fd(write, warn_on_full_buffer=False)

    def listen() -> None:
        while numbers := os.read(read, 64):
            if previous != -1:  # an event loop's
                with contextlib.suppress(OSError):
                    os.write(previous, numbers)
            if number in numbers:
                act()
        os.close(read)

    threading.Thread(target=listen, name="multiprocessing_pdb signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(write)  # the thread reads the end
