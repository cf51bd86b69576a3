"""Names for the parts of a training step, heard by whoever measures them.

    with region("experts"):
        ...

costs a function call while nobody listens. `listening(listener)` lets one hear: `enter(name)` and `leave(name)` are
called in the thread that runs the region, which for a backward pass on a GPU is autograd's. Regions nest. Inside the
compiler there are none; what an operator does in Python is heard there too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch

REGIONS = ("data", "forward", "backward", "routing", "exchange", "experts", "sync", "optimizer")
"""Routing, exchange and experts lie inside forward or backward; "sync" is where ranks agree on loss and norm."""


class Listener(Protocol):
    """Hears the regions of all threads of the process."""

    def enter(self, name: str) -> None: ...

    def leave(self, name: str) -> None: ...


_listeners: list[Listener] = []
_NOTHING = contextlib.nullcontext()


def region(name: str) -> contextlib.AbstractContextManager[Any]:
    """A context that says which of `REGIONS` runs in it."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _Region(name) if _listeners else _NOTHING


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` hear every region that begins in here."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class _Region:
    """Tells the listeners that were there when it began, in reverse order at its end."""

    __slots__ = ("_heard_by", "_name")

    def __init__(self, name: str) -> None:
        self._name = name
        self._heard_by = tuple(_listeners)

    def __enter__(self) -> None:
        for listener in self._heard_by:
            listener.enter(self._name)

    def __exit__(self, *_: object) -> None:
        for listener in reversed(self._heard_by):
            listener.leave(self._name)
