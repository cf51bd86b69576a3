"""What a stopped process answers to others: who it is, an expression in its frame, its stack, and a prompt.

A thread listens while the process is stopped, so that every stopped process answers whoever speaks. Requests carry the
token of the process; on a Unix socket the system also says whose process is at the other end.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from multiprocessing_pdb.messages import Connection, connect, is_this_user, listen
from multiprocessing_pdb.registry import Stop

Answer = Callable[[str, str], str]
"""(operation, text) -> text: "eval" or "where" in the frame that is stopped, or "abort", which does not return."""
_REQUEST_SECONDS = 10.0


class Server:
    """Listens from `__init__` to `close`. `attached` is the connection of whoever asked for the prompt."""

    def __init__(self, path: str, token: str, answer: Answer) -> None:
        self._token, self._answer = token, answer
        self.attached: Connection | None = None
        self.busy = False
        """Whether the prompt is taken, by the terminal or by another client."""
        with contextlib.suppress(OSError):
            os.unlink(path)
        self._socket, self.address = listen(path)
        threading.Thread(target=self._serve, name="multiprocessing_pdb server", daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if not self.address.startswith("127.0.0.1:"):
            with contextlib.suppress(OSError):
                os.unlink(self.address)

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._meet, args=(sock,), daemon=True).start()

    def _meet(self, sock: socket.socket) -> None:
        connection = Connection(sock)
        sock.settimeout(_REQUEST_SECONDS)
        message = connection.receive() or {}
        kept = False
        with contextlib.suppress(OSError):
            if not is_this_user(sock) or not hmac.compare_digest(str(message.get("token")), self._token):
                connection.send(error="refused: not the token of this process")
            else:
                kept = self._handle(connection, message)
        if not kept:
            connection.close()

    def _handle(self, connection: Connection, message: dict[str, Any]) -> bool:
        """Whether the connection stays open."""
        operation, text = str(message.get("op")), str(message.get("text", ""))
        if operation == "attach":
            if self.busy or self.attached is not None:
                connection.send(error="somebody is at its prompt already")
                return False
            connection.sock.settimeout(None)
            connection.send(ok="")
            self.attached = connection
            return True
        if operation == "abort":
            connection.send(ok="")
        if operation in ("abort", "eval", "where"):
            connection.send(ok=self._answer(operation, text))
        else:
            connection.send(error=f"no such operation: {operation}")
        return False


def request(stop: Stop, operation: str, text: str = "") -> str:
    """What a stopped process answers; an error, as text, where it does not."""
    try:
        connection = connect(stop.address, _REQUEST_SECONDS)
    except OSError as error:
        return f"*** no answer: {error}"
    try:
        connection.send(token=stop.token, op=operation, text=text)
        reply = connection.receive()
    except OSError as error:
        return f"*** no answer: {error}"
    finally:
        connection.close()
    if reply is None:
        return "*** no answer"
    return str(reply["ok"]) if "ok" in reply else f"*** {reply.get('error')}"


class RemoteInput:
    """Reads lines from an attached client: `readline` asks for one."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.lost = False

    def readline(self) -> str:
        with contextlib.suppress(OSError):
            self._connection.send(ask=True)
            message = self._connection.receive()
            if message is not None and "line" in message:
                return str(message["line"]) + "\n"
        self.lost = True
        return ""


class RemoteOutput:
    """Writes text to an attached client."""

    encoding = "utf-8"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # found out when the next line is read
            self._connection.send(out=text)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False
