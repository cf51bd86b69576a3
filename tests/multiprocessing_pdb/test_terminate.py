"""A termination that the wait for a key does not notice: the system gave the signal to another thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

from multiprocessing_pdb.terminate import before_terminating
from pseudo_terminal import environment


def terminate_soon() -> threading.Thread:
    def terminate() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    return thread


def test_ends_a_process_that_waits_for_a_key(tmp_path):
    code = """
import select, sys
sys.path.insert(0, sys.argv[1])
from multiprocessing_pdb.terminate import before_terminating
from test_terminate import terminate_soon
terminate_soon()
with before_terminating(lambda: print("restored", flush=True)):
    select.select([], [], [], 60)
print("never")
"""
    here = os.path.dirname(__file__)
    result = subprocess.run(
        [sys.executable, "-c", code, here], env=environment(tmp_path), capture_output=True, text=True, timeout=30
    )
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "restored\n")


def test_calls_the_handler_of_the_process_once_and_the_event_loop_still_hears():
    calls: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: calls.append("handler"))
    read, write = os.pipe()
    os.set_blocking(write, False)
    loop = signal.set_wakeup_fd(write)
    try:
        with before_terminating(lambda: calls.append("restored")):
            thread = terminate_soon()
            end = time.monotonic() + 20
            while len(calls) < 2 and time.monotonic() < end:
                time.sleep(0.02)
            time.sleep(0.3)  # in which it would be sent again
            thread.join()
        assert calls == ["restored", "handler"]
        assert signal.SIGTERM in os.read(read, 64)
        assert signal.set_wakeup_fd(write) == write
    finally:
        signal.set_wakeup_fd(loop)
        signal.signal(signal.SIGTERM, before)
        os.close(read)
        os.close(write)
