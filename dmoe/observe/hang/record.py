"""What a rank knows when nothing moves: RUN/hang/rank{r}.json, the same as text, and reading those of all ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dmoe.errors import RunError
from dmoe.observe.files import write_text
from dmoe.observe.hang.collectives import groups, recorded_collectives
from dmoe.observe.hang.stacks import all_stacks, stack_text

FOLDER = "hang"
_FRAME = re.compile(r'File "(.*)", line (\d+) in (.*)')


def describe_rank(reason: str, *, watcher: int | None = None, **known: Any) -> dict[str, Any]:
    """This rank now.

    Args:
        reason: why it is written.
        watcher: a thread whose stack tells nothing.
        known: what the caller knows: step, phase, region, seconds, messages, left; `threads` to replace the stacks.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    record = {
        "rank": rank,
        "world_size": world_size,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
        "reason": reason,
        "threads": all_stacks(skip=watcher),
        "groups": {},
        "collectives": [],
    } | known
    # The stacks must be written whatever happens here.
    try:
        record |= {"groups": groups(), "collectives": recorded_collectives()}
    except Exception as error:
        record["no_collectives"] = f"{type(error).__name__}: {error}"
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write rank{r}.json and rank{r}.txt, each under a temporary name first. A disk that refuses is no error."""
    with contextlib.suppress(OSError):
        for suffix, text in ((".json", json.dumps(record)), (".txt", record_text(record))):
            write_text(folder / f"rank{record['rank']}{suffix}", text)


def record_text(record: dict[str, Any]) -> str:
    """A record for people: state, stacks, the collectives that are under way and the last of each group."""
    lines = [
        f"rank {record['rank']} of {record['world_size']}, process {record['pid']} on {record['host']}:",
        record["reason"],
        f"step {record.get('step')}, {record.get('phase')}, region {record.get('region')}",
        *(f"\n{stack_text(stack)}" for stack in record["threads"]),
        "\nlast collectives:",
    ]
    for entry in record["collectives"][-20:]:
        lines.append(
            f"  {entry['axis']} group {entry['group']} number {entry['number']}: {entry['call']} {entry['sizes']} "
            f"{entry['state']}, {entry['seconds']:.1f} s ago, from {place(entry['where'])}"
        )
    if record.get("messages"):
        lines.append("\nlast messages:")
    for note in record.get("messages", [])[-20:]:
        direction = "to" if note["kind"] == "send" else "from"
        lines.append(
            f"  {note['kind']} number {note['number']} {direction} rank {note['peer']}: {note['sizes']} "
            f"{note['state']}, {note['seconds']:.1f} s ago, from {place(note['where'])}"
        )
    return "\n".join(lines) + "\n"


def place(where: dict[str, Any] | None) -> str:
    """file:line (function)."""
    if not where:
        return "an unknown place"
    return f"{where['file']}:{where['line']} ({where['function']})"


def read_records(run_dir: Path) -> dict[int, dict[str, Any]]:
    """The records of a run by rank.

    Of a rank that could not write one because some extension held Python's lock there is the stack that faulthandler
    wrote, with "held_lock" True. Raises RunError for a file that is damaged.
    """
    folder = run_dir / FOLDER
    records: dict[int, dict[str, Any]] = {}
    for path in folder.glob("rank*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records[int(record["rank"])] = record
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not a record of a rank: {error}") from error
    for path in folder.glob("rank*.locked.txt"):
        match = re.fullmatch(r"rank(\d+)\.locked\.txt", path.name)
        if match and int(match[1]) not in records and path.stat().st_size:
            records[int(match[1])] = _locked_record(int(match[1]), path)
    return dict(sorted(records.items()))


def clear(folder: Path, rank: int, world_size: int) -> None:
    """Put what an earlier start of the run left in a folder "earlier". Each rank does it for itself, before it begins.

    Rank 0 also does it for ranks that are no more.
    """
    earlier = folder / "earlier"
    with contextlib.suppress(OSError):
        for path in folder.glob("rank*.*"):
            number = int(re.sub(r"\D.*", "", path.name[4:]) or -1)
            if number == rank or (rank == 0 and number >= world_size):
                earlier.mkdir(exist_ok=True)
                os.replace(path, earlier / path.name)
        if rank == 0:
            (folder / "alarm").unlink(missing_ok=True)


def _locked_record(rank: int, path: Path) -> dict[str, Any]:
    """faulthandler writes the innermost call first, and the thread that holds the lock last if it is the main one."""
    text = path.read_text(encoding="utf-8", errors="replace")
    blocks = text.rsplit("Timeout (", 1)[-1].split("\n\n")  # it writes again and again
    threads = []
    for block in blocks:
        frames = [
            {"file": m[1], "line": int(m[2]), "function": m[3], "code": ""}
            for m in map(_FRAME.search, block.split("\n"))
            if m
        ]
        if frames:
            threads.append({"name": block.strip().split("\n")[0], "main": False, "frames": frames[::-1]})
    if threads:
        threads[-1]["main"] = True
    return {
        "rank": rank, "world_size": 0, "host": "", "pid": 0, "time": path.stat().st_mtime, "held_lock": True,
        "reason": "Python's lock was held", "threads": threads[::-1], "groups": {}, "collectives": [],
    }  # fmt: skip
