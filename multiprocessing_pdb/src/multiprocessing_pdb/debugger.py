"""pdb with commands for a job of several processes, and a `quit` that leaves the program running."""

from __future__ import annotations

import contextlib
import os
import pdb
import traceback
from collections.abc import Callable
from types import FrameType
from typing import IO, Any, cast

from multiprocessing_pdb.identity import Identity
from multiprocessing_pdb.registry import Stop, stopped
from multiprocessing_pdb.server import RemoteInput, request
from multiprocessing_pdb.waiting import Waiting

ABORTED = 1
"""Exit code of a process that was told to abort."""


class Debugger(pdb.Pdb):
    """Of one process. Each stop waits for its turn, takes commands, and gives the turn to the next.

    Args:
        me: who this process is.
        timeout: seconds that a stop without a terminal waits for somebody.
        on_detach: called when the person leaves the program to itself.
    """

    def __init__(self, me: Identity, timeout: float | None, on_detach: Callable[[], None]) -> None:
        super().__init__(nosigint=True)
        self._me, self._timeout, self._on_detach = me, timeout, on_detach
        self._waiting: Waiting | None = None
        self._again = self._abort = False
        self._frame: FrameType | None = None
        self.prompt = f"(Pdb {me.label}) "

    # Stopping

    def interaction(self, frame: FrameType | None, tb_or_error: Any) -> None:
        """Talk about `frame`, or about the last frame of a traceback, with whoever comes."""
        self._frame = frame if frame is not None else _last_frame(tb_or_error)
        code = self._frame.f_code
        where = f"{code.co_filename}:{self._frame.f_lineno} {code.co_name}"
        with Waiting(self._me, where, self._answer, self._timeout) as self._waiting:
            while self._waiting.somebody():
                self._again = False
                with self._waiting.files() as (stdin, stdout):
                    self.stdin, self.stdout = cast("IO[str]", stdin), cast("IO[str]", stdout)
                    self.use_rawinput = not isinstance(stdin, RemoteInput)
                    super().interaction(frame, tb_or_error)
                self._waiting.give(stepping=self.stoplineno != -1)
                if self._abort:
                    os._exit(ABORTED)
                if not self._again:
                    break
            else:
                self.set_continue()
        self._waiting = self._frame = None

    def _answer(self, operation: str, text: str) -> str:
        """For the server's thread: an expression, a statement, or the stack, in the frame that is stopped."""
        frame = self._frame
        if frame is None:
            return "*** it goes on"
        if operation == "where":
            return "".join(traceback.format_stack(frame)).rstrip()
        if operation == "abort":
            os._exit(ABORTED)
        variables: Any = frame.f_locals
        with contextlib.suppress(AttributeError):  # what was assigned at the prompt is here, until Python 3.13
            if self.curframe is frame:
                variables = self.curframe_locals
        try:
            try:
                return repr(eval(compile(text.strip(), "<all>", "eval"), frame.f_globals, variables))
            except SyntaxError:
                exec(compile(text.strip(), "<all>", "exec"), frame.f_globals, variables)
                return ""
        except BaseException as error:
            return f"*** {type(error).__name__}: {error}"

    # Commands for the job

    def _others(self) -> list[Stop]:
        assert self._waiting is not None
        return [stop for stop in stopped(self._waiting.job) if stop.pid != self._me.pid]

    def _ask_all(self, operation: str, text: str) -> None:
        assert self._waiting is not None
        for stop in stopped(self._waiting.job):
            mine = stop.pid == self._me.pid
            answer = self._answer(operation, text) if mine else request(stop, operation, text)
            newline = "\n" if "\n" in answer else " "
            self.message(f"{stop.label}:{newline}{answer}")

    def do_ranks(self, _arg: str) -> None:
        """ranks
        List the processes of this job that have stopped, and where."""
        assert self._waiting is not None
        for stop in stopped(self._waiting.job):
            here = "->" if stop.pid == self._me.pid else "  "
            self.message(f"{here} {stop.key:>7}  {stop.label}  {stop.where}")

    def do_rank(self, arg: str) -> bool | None:
        """rank N
        Go to the prompt of rank N (or of the process with that pid), which must have stopped."""
        assert self._waiting is not None
        if arg == self._me.key:
            return None
        if arg not in {stop.key for stop in self._others()}:
            waiting = ", ".join(stop.key for stop in self._others()) or "no other process"
            self.error(f"rank {arg!r} has not stopped; {waiting} has")
            return None
        if self._waiting.switch(arg):
            self.print_stack_entry(self.stack[self.curindex])
            return None
        self._again = True
        return True

    def do_all(self, arg: str) -> None:
        """all EXPRESSION
        Evaluate it in every process that has stopped, each in its own frame."""
        if not arg:
            self.error("all needs an expression, such as all loss.item()")
            return
        self._ask_all("eval", arg)

    def do_where(self, arg: str) -> Any:
        """where [all]
        Print the stack; of every process that has stopped, with all."""
        if arg.strip() == "all":
            return self._ask_all("where", "")
        return super().do_where(arg)

    do_w = do_bt = do_where

    def do_detach(self, arg: str) -> bool:
        """detach (also quit, q, exit and the end of the input)
        Let this process run on, and stop it no more. The job lives."""
        self.clear_all_breaks()
        self.set_continue()
        self._on_detach()
        return True

    do_q = do_quit = do_exit = do_detach

    def do_EOF(self, arg: str) -> bool:
        if isinstance(self.stdin, RemoteInput):  # the client has gone: wait for another
            self._again = True
            return True
        self.message("")
        return self.do_detach(arg)

    def do_abort(self, _arg: str) -> bool:
        """abort
        End the job: this process and all that have stopped exit with an error."""
        for stop in self._others():
            request(stop, "abort")
        self._abort = True
        return True

    def do_run(self, arg: str) -> None:
        """run, restart
        Not here: a process of a job cannot start over by itself."""
        self.error("a process of a job cannot start over; abort ends the job")

    do_restart = do_run


def _last_frame(tb_or_error: Any) -> FrameType:
    tb = getattr(tb_or_error, "__traceback__", tb_or_error)
    while tb.tb_next is not None:
        tb = tb.tb_next
    frame: FrameType = tb.tb_frame
    return frame
