"""The last sends and receives of this rank: a note for each, made where torch.distributed is called.

A pipeline's stages talk so, in `isend` and `irecv` whatever the schedule; `send` and `recv` are made of these. A note
costs a few microseconds.
"""

from __future__ import annotations

import functools
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dmoe.observe.hang.collectives import is_callers

_KEPT = 64


class MessageRecorder:
    """Notes sends and receives from `install` to `remove`."""

    def __init__(self) -> None:
        self._notes: deque[_Note] = deque(maxlen=_KEPT)
        self._counts: dict[tuple[str, str, int], int] = {}
        self._originals: dict[str, Callable[..., Any]] = {}

    def install(self) -> None:
        """Put a wrapper around torch's functions, in both places where torch itself looks for them."""
        for name, kind in (("isend", "send"), ("irecv", "recv")):
            original = self._originals[name] = getattr(dist, name)
            wrapper = self._wrapped(original, kind)
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, wrapper)

    def remove(self) -> None:
        """Undo `install`."""
        for name, original in self._originals.items():
            for module in (dist, dist.distributed_c10d):
                setattr(module, name, original)
        self._originals.clear()

    def recorded(self) -> list[dict[str, Any]]:
        """The last messages, oldest first: {"kind": "send" or "recv", "group", "peer" in the default group, "number"
        among those of this kind with this peer, "sizes", "seconds" since the call, "where", "state"}. The state is
        "completed", "waiting", or, for one that NCCL runs in a batch with others, "issued"."""
        return [note.described() for note in list(self._notes)]

    def _wrapped(self, original: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(
            tensor: Any,
            peer: int | None = None,
            group: Any = None,
            tag: int = 0,
            group_peer: int | None = None,
            **named: Any,
        ) -> Any:
            group_peer = named.pop("group_dst", named.pop("group_src", group_peer))
            peer = named.pop("dst", named.pop("src", peer))
            note = self._note(kind, tensor, _global_rank(group, peer, group_peer), group)
            work = original(tensor, peer, group, tag, group_peer, **named)
            if work is not None:
                note.work = weakref.ref(work)
            return work

        return call

    def _note(self, kind: str, tensor: Any, peer: int, group: Any) -> _Note:
        name = str(getattr(dist.group.WORLD if group is None else group, "group_name", ""))
        key = (kind, name, peer)
        number = self._counts[key] = self._counts.get(key, 0) + 1
        note = _Note(kind, name, peer, number, list(tensor.shape))
        self._notes.append(note)
        return note


class _Note:
    __slots__ = ("group", "kind", "number", "peer", "sizes", "time", "where", "work")

    def __init__(self, kind: str, group: str, peer: int, number: int, sizes: list[int]) -> None:
        self.kind, self.group, self.peer, self.number, self.sizes = kind, group, peer, number, sizes
        self.time = time.monotonic()
        # Weak: a work keeps its tensors. Whoever dropped it has waited for it.
        self.work: Callable[[], Any] | None = None
        frame: Any = sys._getframe(3)
        while frame.f_back is not None and not is_callers(frame.f_code.co_filename):
            frame = frame.f_back
        self.where = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)

    def described(self) -> dict[str, Any]:
        file, line, function = self.where
        return {
            "kind": self.kind,
            "group": self.group,
            "peer": self.peer,
            "number": self.number,
            "sizes": [self.sizes],
            "state": self._state(),
            "seconds": round(time.monotonic() - self.time, 3),
            "where": {"file": file, "line": line, "function": function},
        }

    def _state(self) -> str:
        if self.work is None:
            return "issued"
        work = self.work()
        return "completed" if work is None or work.is_completed() else "waiting"


def _global_rank(group: Any, peer: int | None, group_peer: int | None) -> int:
    if group_peer is None:
        return -1 if peer is None else peer
    return group_peer if group is None else dist.get_global_rank(group, group_peer)
