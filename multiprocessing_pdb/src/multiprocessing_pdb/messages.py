"""Lines of JSON over a local socket, and who may send them."""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

MAX_LINE = 1 << 24


class Connection:
    """A socket that sends and receives dicts, one a line."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._file = sock.makefile("rb")

    def send(self, **message: Any) -> None:
        """Raises OSError when the other side has gone."""
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None when the other side has gone or speaks nonsense."""
        try:
            line = self._file.readline(MAX_LINE)
            message = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def close(self) -> None:
        self._file.close()
        self.sock.close()


def connect(address: str, timeout: float | None = None) -> Connection:
    """To a stopped process; see `registry.Stop.address`."""
    host, colon, port = address.rpartition(":")
    if colon and host == "127.0.0.1":
        return Connection(socket.create_connection((host, int(port)), timeout=timeout))
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(timeout)
    try:
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return Connection(sock)


def listen(path: str) -> tuple[socket.socket, str]:
    """(listening socket, its address): a Unix socket at `path`, or where that cannot be, a port of 127.0.0.1."""
    if hasattr(socket, "AF_UNIX"):
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.bind(path)
            sock.listen()
        except OSError:  # a path that is too long, or a file system without sockets
            sock.close()
        else:
            return sock, path
    sock = socket.create_server(("127.0.0.1", 0))
    return sock, f"127.0.0.1:{sock.getsockname()[1]}"


def is_this_user(sock: socket.socket) -> bool:
    """Whether a process of this user is at the other end. True where the system cannot tell: the token decides then."""
    if sock.family != getattr(socket, "AF_UNIX", None) or not hasattr(socket, "SO_PEERCRED"):
        return True
    _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return uid == os.getuid()
