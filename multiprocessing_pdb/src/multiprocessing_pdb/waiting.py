"""A stopped process until somebody talks to it: announced to the others, waiting for the terminal or for a client."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from multiprocessing_pdb.identity import Identity, job_name
from multiprocessing_pdb.messages import Connection
from multiprocessing_pdb.registry import Stop, announce, job_folder
from multiprocessing_pdb.server import Answer, RemoteInput, RemoteOutput, Server
from multiprocessing_pdb.terminal import Turn, find_terminal, standard_files

DEFAULT_TIMEOUT = 600.0
"""Seconds that a stop without a terminal waits for a client, unless told otherwise."""
_POLL_SECONDS = 0.02
_STEP_SECONDS = 0.5
_SWITCH_SECONDS = 5.0


def loud(text: str) -> None:
    """One line that is seen: on the standard error of the process, whatever has replaced it."""
    with contextlib.suppress(Exception):
        print(f"\nmultiprocessing_pdb: {text}", file=sys.__stderr__, flush=True)


class Waiting:
    """From a stop to the moment the program goes on. A context manager."""

    def __init__(self, me: Identity, where: str, answer: Answer, timeout: float | None) -> None:
        self._me, self._where, self._timeout = me, where, timeout
        self.job = job_name()
        folder = job_folder(self.job)
        token = secrets.token_hex(16)
        self._server = Server(str(folder / f"{me.pid}.sock"), token, answer)
        self._file: Path = announce(
            self.job, Stop(me.key, me.label, me.pid, self._server.address, token, where)
        )  # fmt: skip
        self._terminal = find_terminal()
        self._turn = Turn(folder)
        self._told = False
        self.client: Connection | None = None

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink()
        self._server.close()
        if self._server.attached is not None:  # it came while the program went on
            self._server.attached.close()

    def somebody(self) -> bool:
        """Wait for the terminal or a client. False: nobody came, or nobody can."""
        deadline = time.monotonic() + (DEFAULT_TIMEOUT if self._timeout is None else self._timeout)
        if self._terminal is None and os.environ.get("CI", "").lower() not in ("", "0", "false"):
            loud(f"{self._me.label} would stop at {self._where}, but has no terminal and CI is set: it goes on")
            return False
        while True:
            if self._terminal is not None and self._turn.try_take(self._me.key):
                self._server.busy = True
                return True
            if self._server.attached is not None:
                self.client, self._server.attached, self._server.busy = self._server.attached, None, True
                return True
            if self._terminal is None:
                self._tell()
                if time.monotonic() > deadline:
                    loud(f"{self._me.label} stopped at {self._where}, and nobody attached: it goes on")
                    return False
            time.sleep(_POLL_SECONDS)

    def _tell(self) -> None:
        if not self._told:
            attach = f"python -m multiprocessing_pdb attach {self.job} {self._me.key}"
            loud(f"{self._me.label} stopped at {self._where}; {attach}")
            self._told = True

    @contextlib.contextmanager
    def files(self) -> Iterator[tuple[IO[str] | RemoteInput, IO[str] | RemoteOutput]]:
        """Where to read commands from and to write to, of whoever came."""
        if self.client is not None:
            try:
                yield RemoteInput(self.client), RemoteOutput(self.client)
            finally:
                self.client.close()
                self.client, self._server.busy = None, False
            return
        assert self._terminal is not None
        with standard_files(self._terminal) as files:
            yield files

    def give(self, *, stepping: bool) -> None:
        """Let another process speak; while stepping, after a moment in which this one may come back."""
        self._turn.give(self._me.key if stepping else None, _STEP_SECONDS)
        self._server.busy = False

    def switch(self, key: str) -> bool:
        """Let the process `key` speak. On the terminal, returns True when it is this one's turn again; a client goes
        there itself, and False says that this one has to wait for another."""
        if self.client is not None:
            with contextlib.suppress(OSError):
                self.client.send(next=key)
            return False
        self._turn.give(key, _SWITCH_SECONDS)
        time.sleep(2 * _POLL_SECONDS)
        while not self._turn.try_take(self._me.key):
            time.sleep(_POLL_SECONDS)
        return True
