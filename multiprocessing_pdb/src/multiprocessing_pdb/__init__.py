"""pdb in every process of a job.

    from multiprocessing_pdb import MultiprocessingPdb

    Tra = MultiprocessingPdb().set_trace
    ...
    Tra()

stops in the caller's frame, in a main process, a forked or spawned child, a DataLoader's worker or a rank of torchrun.
On a terminal one process speaks at a time; without one, `python -m multiprocessing_pdb attach` opens the prompt.
In the environment MULTIPROCESSING_PDB=0 turns every stop off, and PYTHONBREAKPOINT=multiprocessing_pdb.set_trace makes
`breakpoint()` stop here.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType

from multiprocessing_pdb.debugger import Debugger
from multiprocessing_pdb.identity import identity, job_name
from multiprocessing_pdb.timeouts import Timeouts

__all__ = ["MultiprocessingPdb", "install_excepthook", "post_mortem", "set_trace"]

_timeouts = Timeouts()
_detached = False


class MultiprocessingPdb:
    """A place to stop at.

    Make it early, in every process: from then on the timeouts of torch's process groups are long, so that other ranks
    outlive a stop. They are given back to a process when its person detaches.

    Args:
        ranks: "all", or the rank or ranks that stop; a process without a rank counts as rank 0.
        when: stop only if this is true, or returns something true.
        once: stop no more than once in a process.
        timeout: seconds to wait for somebody to attach where there is no terminal (600); then the program goes on.
    """

    def __init__(
        self,
        *,
        ranks: str | int | Iterable[int] = "all",
        when: bool | Callable[[], object] = True,
        once: bool = False,
        timeout: float | None = None,
    ) -> None:
        self.ranks, self.when = _rank_set(ranks), when
        self.once, self.timeout = once, timeout
        self._has_stopped = False
        if _enabled():
            job_name()  # children inherit it
            _timeouts.hold()

    def set_trace(
        self,
        frame: FrameType | None = None,
        *,
        ranks: str | int | Iterable[int] | None = None,
        when: bool | Callable[[], object] | None = None,
    ) -> None:
        """Stop at the caller's next line. The arguments override those of the object for this call."""
        wanted = self.ranks if ranks is None else _rank_set(ranks)
        condition = self.when if when is None else when
        if not _enabled() or _detached or (self.once and self._has_stopped):
            return
        me = identity()
        if wanted is not None and (me.rank or 0) not in wanted:
            return
        if not (condition() if callable(condition) else condition):
            return
        self._has_stopped = True
        _timeouts.hold()
        Debugger(me, self.timeout, _detach).set_trace(frame or sys._getframe(1))

    def post_mortem(self, error: BaseException | None = None) -> None:
        """Stop where `error`, or the exception that is being handled, was raised."""
        error = error or sys.exc_info()[1] or getattr(sys, "last_value", None)
        if error is None or error.__traceback__ is None:
            raise ValueError("post_mortem needs an exception that was raised")
        if not _enabled() or _detached:
            return
        me = identity()
        if self.ranks is not None and (me.rank or 0) not in self.ranks:
            return
        _timeouts.hold()
        debugger = Debugger(me, self.timeout, _detach)
        debugger.reset()
        debugger.interaction(None, error.__traceback__)


def set_trace(*, ranks: str | int | Iterable[int] = "all", when: bool | Callable[[], object] = True) -> None:
    """Stop at the caller's next line; for `breakpoint()` with PYTHONBREAKPOINT=multiprocessing_pdb.set_trace."""
    MultiprocessingPdb(ranks=ranks, when=when).set_trace(sys._getframe(1))


def post_mortem(error: BaseException | None = None) -> None:
    """Stop where `error`, or the exception that is being handled, was raised."""
    MultiprocessingPdb().post_mortem(error or sys.exc_info()[1])


def install_excepthook() -> None:
    """Stop in a process that an exception would end, where it was raised; afterwards the process ends with it."""
    debugger = MultiprocessingPdb()

    def hook(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
        traceback.print_exception(kind, error, tb)
        if isinstance(error, Exception) and tb is not None:
            debugger.post_mortem(error)

    sys.excepthook = hook


def _rank_set(ranks: str | int | Iterable[int]) -> frozenset[int] | None:
    """None: all."""
    if isinstance(ranks, str):
        if ranks != "all":
            raise ValueError(f'ranks is {ranks!r}: must be "all", a rank, or several')
        return None
    return frozenset([ranks] if isinstance(ranks, int) else ranks)


def _enabled() -> bool:
    return os.environ.get("MULTIPROCESSING_PDB", "1").lower() not in ("0", "off", "false", "no")


def _detach() -> None:
    global _detached
    _detached = True
    _timeouts.release()
