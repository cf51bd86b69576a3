"""The Python stacks of all threads, as plain data."""

from __future__ import annotations

import linecache
import sys
import threading
import traceback
from types import TracebackType
from typing import Any

_MAX_FRAMES = 80


def all_stacks(skip: int | None = None) -> list[dict[str, Any]]:
    """Every thread: {"name", "main", "frames"}, the main one first; frames as in a traceback, the innermost last.

    Reads no local variable, so that a debugger that stopped a thread is not disturbed.

    Args:
        skip: identifier of a thread to leave out.
    """
    threads = {t.ident: t for t in threading.enumerate()}
    stacks = []
    for ident, frame in sys._current_frames().items():
        if ident == skip:
            continue
        thread = threads.get(ident)
        frames = [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_stack(frame)]
        stacks.append(
            {
                "name": thread.name if thread is not None else f"thread {ident}",
                "main": thread is threading.main_thread(),
                "frames": _described(frames[::-1]),
            }
        )
    return sorted(stacks, key=lambda stack: not stack["main"])


def traceback_stack(trace: TracebackType | None) -> dict[str, Any]:
    """The main thread where an exception was raised, in the form of `all_stacks`."""
    frames = [(f.f_code.co_filename, line, f.f_code.co_name) for f, line in traceback.walk_tb(trace)]
    return {"name": "MainThread", "main": True, "frames": _described(frames)}


def stack_text(stack: dict[str, Any]) -> str:
    """A stack as a traceback shows it."""
    lines = [f"{stack['name']}{' (main)' if stack['main'] else ''}, the innermost call last:"]
    for frame in stack["frames"]:
        lines.append(f'  File "{frame["file"]}", line {frame["line"]}, in {frame["function"]}')
        if frame.get("code"):
            lines.append(f"    {frame['code']}")
    return "\n".join(lines)


def _described(frames: list[tuple[str, int, str]]) -> list[dict[str, Any]]:
    return [
        {"file": file, "line": line, "function": function, "code": linecache.getline(file, line).strip()}
        for file, line, function in frames[-_MAX_FRAMES:]
    ]
