"""`HangWatch`: a thread that sees when this rank, or another one, has stopped moving, and writes where it is."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch.distributed as dist

from dmoe.config import ProfilingConfig
from dmoe.errors import DmoeError
from dmoe.observe.hang.alarm import Alarm
from dmoe.observe.hang.messages import MessageRecorder
from dmoe.observe.hang.record import FOLDER, clear, describe_rank, write_record
from dmoe.observe.hang.stacks import all_stacks, traceback_stack
from dmoe.ops.regions import listening

_LONGEST_INTERVAL = 2.0
_ABORT_GRACE = 5.0


class HangWatch:
    """Watches a run from `with watch:` on, every rank its own; see `dmoe doctor`.

        with HangWatch(profiling, run_dir) as watch:
            for step in range(1, n + 1):
                watch.begin(step); ...; watch.end(step)

    A rank moves when a step begins or ends, or one of `dmoe.ops.regions.REGIONS` does. One that has not moved for
    `profiling.hang_timeout` seconds writes RUN/hang/rank{r}.json and .txt and tells the others, which do the same, so
    that those outside a step are seen too. All write again after each such time until they move. When an extension
    holds Python's lock, so that no thread can run, faulthandler writes the stacks to rank{r}.locked.txt.

    Only files are written: a rank that a debugger has stopped is not disturbed. With `profiling.hang_abort` the process
    ends a little later. With a `hang_timeout` of 0 nothing is watched.
    """

    def __init__(self, profiling: ProfilingConfig, run_dir: Path) -> None:
        self._timeout, self._abort = profiling.hang_timeout, profiling.hang_abort
        self._run_dir, self._folder = run_dir, run_dir / FOLDER
        self._interval = min(self._timeout / 4, _LONGEST_INTERVAL)
        self._regions = _RegionStacks()
        self._messages = MessageRecorder()
        self._step, self._phase, self._marks = 0, "set-up", 0
        self._begun = False
        self._ended = threading.Event()
        self._exit = contextlib.ExitStack()
        self._rank, self._world_size = 0, 1

    def begin(self, step: int) -> None:
        """Step `step` begins."""
        if self._timeout and not self._begun:  # not earlier: a run that is refused leaves its directory as it was
            if self._state.record is None:
                clear(self._folder, self._rank, self._world_size)
            self._begun = True
        self._step, self._phase = step, "step"
        self._marks += 1

    def end(self, step: int) -> None:
        """It has ended; what follows is logging, validation, a checkpoint."""
        self._step, self._phase = step, "after the step"
        self._marks += 1

    def close(self) -> None:
        """No step follows; the watch goes on to the end of `with`."""
        self._phase = "after the last step"
        self._marks += 1

    def __enter__(self) -> HangWatch:
        if not self._timeout:
            return self
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._alarm = Alarm(self._folder)
        if self._world_size > 1:
            self._messages.install()
            self._exit.callback(self._messages.remove)
        self._exit.enter_context(listening(self._regions))
        self._state = _State(self._moves(), self._alarm.state())
        thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        thread.start()
        self._exit.callback(thread.join, 5)
        self._exit.callback(self._ended.set)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._timeout:
            return
        self._exit.close()
        self._note_moves(self._state)
        if self._world_size > 1:
            if error is not None and _is_failure(error):
                self._write_failure(error)
            reason = None if error is None else " ".join(f"{type(error).__name__}: {error}".split())
            self._alarm.leave({"step": self._step, "phase": self._phase, "error": reason})

    def _write_failure(self, error: BaseException) -> None:
        """A collective that failed may be the first that is seen of a rank that hangs: the others write too."""
        while error.__cause__ is not None:
            error = error.__cause__
        others = [stack for stack in all_stacks() if not stack["main"]]
        threads = [traceback_stack(error.__traceback__), *others]
        reason = "failed: " + " ".join(f"{type(error).__name__}: {error}".split())[:500]
        write_record(self._folder, describe_rank(reason, **self._known(0.0), threads=threads, state="failed"))
        self._alarm.sound()

    def _watch(self) -> None:
        """The thread."""
        with contextlib.ExitStack() as stack:
            locked_file: TextIO | None = None
            while not self._ended.wait(self._interval):
                try:
                    if locked_file is None and self._begun:
                        locked_file = stack.enter_context(_removed_if_empty(self._locked_path))
                    if locked_file is not None:
                        # Never heard of while this thread gets Python's lock: each round puts it off.
                        faulthandler.dump_traceback_later(self._timeout + self._interval, repeat=True, file=locked_file)
                    self._look(self._state)
                except Exception as error:
                    _say(f"rank {self._rank}: the hang watch failed: {type(error).__name__}: {error}")
                    return

    def _look(self, state: _State) -> None:
        self._note_moves(state)
        now, alarm = time.monotonic(), self._alarm.state()
        stuck = now - state.since
        since_written = float("inf") if state.record is None else now - state.written
        if stuck >= self._timeout and since_written >= self._timeout:
            first = self._alarm.sound()
            state.record = self._write(f"has not moved for {stuck:.1f} s", stuck, "stuck")
            state.written = now
            if first:
                _say(
                    f"rank {self._rank} has not moved for {stuck:.0f} s in step {self._step}: all ranks write to "
                    f"{self._folder}; dmoe doctor {self._run_dir} says who is missing"
                )
        elif alarm[0] > state.alarm[0] or alarm[1] > state.alarm[1]:
            if since_written >= self._timeout / 2:
                state.record = self._write("another rank does not move", stuck, "heard")
                state.written = now
        elif self._abort and state.record is not None and stuck >= self._timeout + _ABORT_GRACE:
            self._end_process(state.record)
        state.alarm = alarm if stuck < self._timeout else self._alarm.state()

    def _note_moves(self, state: _State) -> None:
        moves, now = self._moves(), time.monotonic()
        if moves == state.moves:
            return
        if state.record is not None:
            seconds = state.record["seconds"] + now - state.written
            write_record(self._folder, state.record | {"state": "went on", "went_on_after": round(seconds, 3)})
        state.moves, state.since, state.record = moves, now, None

    def _write(self, reason: str, seconds: float, state: str) -> dict[str, Any]:
        record = describe_rank(reason, watcher=threading.get_ident(), **self._known(seconds), state=state)
        write_record(self._folder, record)
        return record

    def _known(self, seconds: float) -> dict[str, Any]:
        return {
            "step": self._step,
            "phase": self._phase,
            "region": self._regions.text(),
            "seconds": round(seconds, 3),
            "timeout": self._timeout,
            "messages": self._messages.recorded(),
            "left": self._alarm.left(self._world_size),
        }

    def _end_process(self, record: dict[str, Any]) -> None:
        """Unless a debugger has stopped it."""
        if any(frame["file"].endswith("/bdb.py") for frame in record["threads"][0]["frames"]):
            return
        _say(f"error: rank {self._rank} {record['reason']} in step {self._step}: ended by profiling.hang_abort")
        _remove_if_empty(self._locked_path)
        os._exit(1)

    @property
    def _locked_path(self) -> Path:
        """Of the stacks that are written while Python's lock is held."""
        return self._folder / f"rank{self._rank}.locked.txt"

    def _moves(self) -> int:
        return self._marks + self._regions.moves


class _State:
    """What the thread knows from the round before."""

    def __init__(self, moves: int, alarm: tuple[int, int]) -> None:
        self.moves, self.alarm = moves, alarm
        self.since = self.written = time.monotonic()
        self.record: dict[str, Any] | None = None
        """What was written since this rank moved last."""


class _RegionStacks:
    """Hears the regions of all threads. Counts them without a lock: that a count may be lost does not matter."""

    def __init__(self) -> None:
        self.moves = 0
        self._stacks: dict[int, list[str]] = {}

    def enter(self, name: str) -> None:
        self.moves += 1
        self._stacks.setdefault(threading.get_ident(), []).append(name)

    def leave(self, name: str) -> None:
        self.moves += 1
        self._stacks[threading.get_ident()].pop()

    def text(self) -> str | None:
        """The regions that are open now, the outermost first."""
        main = threading.main_thread().ident
        stacks = sorted(self._stacks.copy().items(), key=lambda item: item[0] != main)
        return " > ".join(name for _, names in stacks for name in names) or None


def _is_failure(error: BaseException) -> bool:
    """Whether something broke under way, as opposed to a request that all ranks refuse alike."""
    return isinstance(error, Exception) and not (isinstance(error, DmoeError) and error.__cause__ is None)


@contextlib.contextmanager
def _removed_if_empty(path: Path) -> Iterator[TextIO]:
    """The file at `path`, open, for faulthandler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            yield file
        finally:
            faulthandler.cancel_dump_traceback_later()
    _remove_if_empty(path)


def _remove_if_empty(path: Path) -> None:
    """And its folder, if nothing else is in it."""
    with contextlib.suppress(OSError):
        if not path.stat().st_size:
            path.unlink()
            path.parent.rmdir()


def _say(line: str) -> None:
    with contextlib.suppress(OSError):
        sys.stderr.write(f"dmoe: {line}\n")
        sys.stderr.flush()
