"""`python -m multiprocessing_pdb`: list the jobs that wait, attach to a process, ask all of them at once."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from multiprocessing_pdb.messages import connect
from multiprocessing_pdb.registry import Stop, jobs, stopped
from multiprocessing_pdb.server import request


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m multiprocessing_pdb", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="show jobs and the processes of each that wait")
    attach = verbs.add_parser("attach", help="open the prompt of a process, or run one command: attach JOB all EXPR")
    attach.add_argument("job", nargs="?", help="its name, where several wait")
    attach.add_argument("rank", nargs="?", help="the rank, or the pid of a process that is none; the first that waits")
    attach.add_argument("command", nargs=argparse.REMAINDER, help="an expression for all, after the word all")
    options = parser.parse_args(arguments)
    waiting = list(jobs())
    if options.verb == "list":
        for job in waiting:
            print(f"job {job}\n{table(stopped(job))}")
        return 0
    job = options.job
    if job is not None and job not in waiting and options.rank is None and len(waiting) == 1:
        job, options.rank = waiting[0], job  # attach RANK
    if job is None and len(waiting) == 1:
        job = waiting[0]
    if job not in waiting:
        which = f"no job {job}" if job else "no job" if not waiting else "several jobs"
        print(f"{which} waits at a line{''.join(f'; {name} does' for name in waiting)}", file=sys.stderr)
        return 1
    if options.rank == "all":
        for stop in stopped(job):
            print(f"{stop.label}: {request(stop, 'eval', ' '.join(options.command))}")
        return 0
    return _attach(job, options.rank)


def table(stops: Sequence[Stop]) -> str:
    return "\n".join(f"  {stop.key:>7}  {stop.label:32} {stop.where}" for stop in stops)


def _attach(job: str, key: str | None) -> int:
    """Follow the prompt from process to process until one goes on, or the input ends."""
    print(table(stopped(job)))
    while True:
        stops = stopped(job)
        chosen = [stop for stop in stops if key in (None, stop.key)]
        if not chosen:
            print(f"{key} does not wait; those that do:\n{table(stops)}", file=sys.stderr)
            return 1
        key = _talk(chosen[0])
        if key is None:
            return 0


def _talk(stop: Stop) -> str | None:
    """Show what it writes and send it lines. Returns the process to go to next, if it says one."""
    try:
        connection = connect(stop.address)
        connection.send(token=stop.token, op="attach")
    except OSError as error:
        raise SystemExit(f"{stop.label}: {error}") from None
    prompt = ""
    with contextlib.suppress(OSError):
        while (message := connection.receive()) is not None:
            if "error" in message:
                raise SystemExit(f"{stop.label}: {message['error']}")
            if "out" in message:  # an unfinished line is kept: it is the prompt of the next question
                whole, newline, prompt = (prompt + message["out"]).rpartition("\n")
                print(whole, end=newline, flush=True)
            elif "ask" in message:
                try:
                    connection.send(line=input(prompt))
                except EOFError:
                    print()
                    break
                prompt = ""
            elif "next" in message:
                return str(message["next"])
    connection.close()
    if prompt:
        print(prompt)
    return None
