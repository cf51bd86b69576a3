"""Seconds and bytes of one call, and what to do when it fails."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor

TOO_LONG = "no result in"
_FLUSH_BYTES = 2**30  # several times the L2 cache of any GPU
_FLUSHES = 12  # some 4 ms on an H100, in which the host is ahead by the launches of any call


class Clock:
    """Seconds of one call.

    On a GPU by events. Before the first event a large buffer is overwritten, again and again: the call finds a cold L2
    cache, as a layer between others does, and its launches run ahead of the device, as they do in the middle of a
    training step.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES if self._cuda else 0, dtype=torch.uint8, device=device)

    def seconds(self, run: Callable[[], Any]) -> float:
        if not self._cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        for _ in range(_FLUSHES):
            self._flush.zero_()
        start_event.record()
        run()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3


def saved_bytes(run: Callable[[], Tensor], known: Sequence[Tensor]) -> int:
    """Bytes that autograd holds after `run()` for its backward, beside the tensors in `known` and the output.

    Every storage is counted once and whole: a view keeps all of it alive.
    """
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        # Kept alive, so that no two storages can have had the same address. Not as the tensor itself: a node that saves
        # its own output would hold what holds the node, for ever.
        held.append(tensor.detach())
        return held[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    ours = {t.untyped_storage().data_ptr() for t in (*known, output)}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(size for address, size in storages.items() if address not in ours)


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """The most memory that `run()` had allocated at once, beyond what was allocated before it. None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class TimeLimit(BaseException):
    """A call took longer than it may. Not an Exception: an autotuner that catches those must not swallow it."""


class DeviceLost(RuntimeError):
    """The GPU answers nothing any more: what ran on it wrote where it must not."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise `TimeLimit` inside the block after that time; no limit for None or outside the main thread.

    The alarm repeats, for code that catches everything. A call into C++ is interrupted when it returns.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise TimeLimit(f"{TOO_LONG} {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def attempt(run: Callable[[], Any], limit: float | None = None) -> tuple[Any, str | None]:
    """(result, None), or (None, why there is none): "out of memory", or the error in one line. Frees the cache then.

    Raises:
        DeviceLost: the failure took the GPU with it.
    """
    try:
        with time_limit(limit):
            return run(), None
    except (Exception, TimeLimit) as error:
        problem = _in_one_line(error)
    if torch.cuda.is_available():
        gc.collect()  # the frames of the failure may hold tensors in cycles
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            raise DeviceLost(f"{problem}; the GPU is lost to this process") from error
    return None, problem


def _in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    words = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError) or any(word in text for word in words):
        return "out of memory"
    if isinstance(error, TimeLimit):
        return text
    return f"{type(error).__name__}: {text}"[:160]
