"""When a rank waits for a collective, whoever started it: our dispatchers, FSDP, tensor parallelism, a pipeline.

Every wait of Python code goes through `Work.wait` or the operator `wait_tensor`, and FSDP on a GPU lets its stream wait
for an event. These three are replaced while somebody listens, because torch has no hook for them. They should stay so
for the whole run, as the compiler takes another object in their place for a reason to compile again. A compiled graph
itself waits without Python and is not heard.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from dmoe.observe.timeline.marks import WAITING
from dmoe.ops.regions import Listener


@contextlib.contextmanager
def hearing_waits(listener: Listener, hears: Callable[[], bool]) -> Iterator[None]:
    """Let `listener` hear each wait as region `WAITING`.

    Args:
        hears: whether a wait that begins now in this thread is of interest.
    """

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not hears():
                return function(*args, **kwargs)
            listener.enter(WAITING)
            try:
                return function(*args, **kwargs)
            finally:
                listener.leave(WAITING)

        return wait

    with contextlib.ExitStack() as stack:
        if dist.is_available():
            stack.enter_context(_replaced(dist.Work, "wait", timed(dist.Work.wait)))
            operators = torch.ops._c10d_functional
            stack.enter_context(_replaced(operators, "wait_tensor", _Operator(operators.wait_tensor, timed)))
        if torch.cuda.is_available():
            wait_event = torch.cuda.Stream.wait_event
            stack.enter_context(_replaced(torch.cuda.Stream, "wait_event", _of_fsdp(wait_event, timed(wait_event))))
        yield


class _Operator:
    """An operator that is timed when it is called, and else is itself: others read its overloads."""

    def __init__(self, operator: Any, timed: Callable[[Any], Callable[..., Any]]) -> None:
        self._operator, self._timed = operator, timed(operator)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._operator, name)


def _of_fsdp(plain: Callable[..., Any], timed: Callable[..., Any]) -> Callable[..., Any]:
    """`timed` where FSDP lets the stream that computes wait. Its own streams wait too, and cost nobody anything."""

    def wait_event(stream: torch.cuda.Stream, event: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("torch.distributed") and stream == torch.cuda.current_stream(stream.device):
            return timed(stream, event)
        return plain(stream, event)

    return wait_event


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)
