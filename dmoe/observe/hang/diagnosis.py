"""Sentences made of the records of all ranks: who did not come to which collective, and where it is instead.

Pure functions on what `record.read_records` gives. A rank waits for the members of a group that have not called the
collective it is in, and for the rank whose message it wants. Ranks that others wait for, and that wait for nobody
themselves, are the cause; if there are none, ranks wait for each other in a circle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dmoe.observe.hang.record import place

Record = dict[str, Any]
Records = dict[int, Record]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """"missing", "mismatch", "circle", "no record", "failed", "stuck", "slow", "straggler", "non-finite", "memory"."""
    message: str
    """Plain sentences."""
    ranks: tuple[int, ...] = ()
    """The ranks that it is about."""


@dataclass(frozen=True)
class _Wait:
    """A call that a rank is in, and the ranks that it waits for."""

    what: str
    where: str
    seconds: float
    missing: tuple[int, ...]
    reached: dict[int, str]
    """How far those are."""


# Files of torch, of this package, and of no file: not where a call came from.
_INNER_FILE = re.compile(r"/torch/|/dmoe/observe/|^<")
_PYTHON_FILE = re.compile(r"/lib/python3\.\d+/")
# Calls that wait although the innermost Python frame is not torch's own.
_WAITING_CALL = re.compile(r"wait|\.item\(|\.tolist\(|\.cpu\(|synchronize|barrier|\.to\(")
# Each rank has its own sizes in these.
_UNEVEN = re.compile(r"alltoall|all_to_all|gather_into|scatter|^gather|coalesced|send|recv")


def diagnose(records: Records) -> list[Finding]:
    """What the records of a run's ranks say, the likely causes first. Empty if there are no records."""
    if not records:
        return []
    world_size = max([r["world_size"] for r in records.values()] + [max(records) + 1])
    if all(r.get("state") == "went on" for r in records.values()):
        return [_went_on(records)]
    mismatches = list(_mismatches(records))
    waits = {rank: list(_waits(rank, records)) for rank in records}
    findings = [*_failures(records), *mismatches]
    blamed = {rank for ws in waits.values() for w in ws for rank in w.missing}
    causes = [rank for rank in sorted(blamed) if not waits.get(rank)]
    if not mismatches:
        findings += [_missing(rank, waits, records) for rank in causes]
        if blamed and not causes:
            findings.append(_circle(waits, records))
    silent = [rank for rank in range(world_size) if rank not in records and rank not in causes]
    if silent and world_size > 1:
        findings.append(Finding("no record", f"{_ranks(silent)} {_absence(silent[0], records)}.", tuple(silent)))
    explained = {rank for f in findings for rank in f.ranks} | {rank for rank, ws in waits.items() if ws}
    if mismatches:  # those on the other side of it
        explained |= {rank for rank, r in records.items() if _is_in_a_wait(r)}
    stuck = [rank for rank, r in records.items() if rank not in explained and r.get("state") != "heard"]
    findings += _stuck(stuck, records, alone=world_size == 1)
    return findings


def _waits(rank: int, records: Records) -> Iterator[_Wait]:
    """What a rank waits for. Nothing if it is in a call that does not wait, as with communication under way."""
    record = records[rank]
    if not _is_in_a_wait(record):
        return
    groups = set()
    for entry in record["collectives"]:
        group = entry["group"]
        members = _members(record, group)
        # gloo marks one that failed like one that is complete: the last of a rank that failed is taken for it.
        broke = record.get("state") == "failed" and entry is record["collectives"][-1]
        if (entry["state"] == "completed" and not broke) or group in groups or rank not in members:
            continue
        numbers = {m: _last_number(records.get(m), group) for m in members if m != rank}
        missing = tuple(m for m, number in numbers.items() if number < entry["number"])
        if missing:
            groups.add(group)
            far = {m: _reached(m, numbers[m], records) for m in missing}
            what = f"{entry['call']} number {entry['number']} of {_group(record, entry)}"
            yield _Wait(what, place(entry["where"]), entry["seconds"], missing, far)
    yield from _message_waits(rank, records)


def _message_waits(rank: int, records: Records) -> Iterator[_Wait]:
    for note in records[rank].get("messages", []):
        peer, number = note["peer"], note["number"]
        if note["state"] == "completed" or (note["kind"] == "send" and note["state"] != "waiting"):
            continue
        wanted = "send" if note["kind"] == "recv" else "recv"
        done = max(
            (
                other["number"]
                for other in records.get(peer, {}).get("messages", [])
                if (other["kind"], other["peer"], other["group"]) == (wanted, rank, note["group"])
            ),
            default=0,
        )
        if done >= number:
            continue
        direction = "from" if note["kind"] == "recv" else "to"
        what = f"{note['kind']} number {number} {direction} rank {peer} in {_group(records[rank], note)}"
        verb = "sent" if wanted == "send" else "asked for"
        far = f": rank {peer} has {verb} {done} of them" if peer in records else ""
        yield _Wait(what, place(note["where"]), note["seconds"], (peer,), {peer: far})
        return


def _mismatches(records: Records) -> Iterator[Finding]:
    """Of each group the first number under which ranks called different things."""
    calls: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for rank, record in records.items():
        for entry in record["collectives"]:
            calls.setdefault((entry["group"], entry["number"]), {})[rank] = entry
    seen = set()
    for (group, number), by_rank in sorted(calls.items(), key=lambda item: item[0][1]):
        kinds = {rank: _signature(entry) for rank, entry in by_rank.items()}
        if group in seen or len(set(kinds.values())) < 2:
            continue
        if all(entry["state"] == "completed" for entry in by_rank.values()):
            continue  # it went well: some sizes may differ
        seen.add(group)
        sides: dict[tuple[str, ...], list[int]] = {}
        for rank, kind in kinds.items():
            sides.setdefault((*kind, place(by_rank[rank]["where"])), []).append(rank)
        told = "; ".join(
            f"{_ranks(members)} called {by_rank[members[0]]['call']} {_sizes(by_rank[members[0]])} at {side[-1]}"
            for side, members in sides.items()
        )
        first = next(iter(by_rank))
        fewest = min(sides.values(), key=len)
        message = (
            f"the ranks of {_group(records[first], by_rank[first])} disagree in collective number {number}: {told}. "
            "One of them left out or added a collective there or before, or its tensor has another size."
        )
        yield Finding("mismatch", message, tuple(fewest if len(sides) > 1 else by_rank))


def _signature(entry: dict[str, Any]) -> tuple[str, ...]:
    if _UNEVEN.search(entry["kind"]) or _UNEVEN.search(entry["call"]):
        return (entry["kind"],)
    sizes = ",".join(str(math.prod(size)) for size in entry["sizes"])
    return (entry["kind"], sizes, ",".join(map(str, entry["dtypes"])))


def _missing(rank: int, waits: dict[int, list[_Wait]], records: Records) -> Finding:
    """A rank that others wait for."""
    waiting = [(other, w) for other, ws in waits.items() for w in ws if rank in w.missing]
    # What lacks this rank alone says most, then what has waited longest.
    _, wait = max(waiting, key=lambda item: (-len(item[1].missing), item[1].seconds))
    same = sorted({other for other, w in waiting if w.what == wait.what})
    message = (
        f"rank {rank} did not come to {wait.what}, where {_ranks(same)} {_verb(same, 'waits', 'wait')} since "
        f"{wait.seconds:.1f} s, called at {wait.where}{wait.reached[rank]}. {_whereabouts(rank, records)}"
    )
    rest = sorted(other for other, ws in waits.items() if ws and other not in same)
    if rest:
        message += f" As a consequence {_ranks(rest)} {_verb(rest, 'waits', 'wait')}: "
        message += "; ".join(f"rank {other} in {waits[other][0].what}" for other in rest[:4])
        message += "; ..." if len(rest) > 4 else "."
    return Finding("missing", message, (rank,))


def _circle(waits: dict[int, list[_Wait]], records: Records) -> Finding:
    inside = sorted(rank for rank, ws in waits.items() if ws)
    told = "; ".join(
        f"rank {rank} waits for {_ranks(waits[rank][0].missing)} in {waits[rank][0].what}, called at "
        f"{waits[rank][0].where}"
        for rank in inside[:8]
    )
    message = f"{_ranks(inside)} wait for each other: {told}. They call collectives or messages in different orders."
    if len(inside) > 8:
        message += f" (8 of {len(inside)} are shown.)"
    return Finding("circle", message, tuple(inside))


def _failures(records: Records) -> Iterator[Finding]:
    """Ranks that ended with an error: the first of them may be why the others wait."""
    for rank, record in records.items():
        if record.get("state") == "failed":
            where = _innermost(record)
            message = f"rank {rank} {record['reason']} in step {record['step']}, at {place(where)}."
            yield Finding("failed", message, (rank,))
    notes = {rank: note for record in records.values() for rank, note in record.get("left", {}).items()}
    for rank, note in notes.items():
        if note.get("error") and int(rank) not in records:
            message = f"rank {rank} left the run in step {note['step']} because of {note['error']}."
            yield Finding("failed", message, (int(rank),))


def _stuck(ranks: list[int], records: Records, *, alone: bool) -> Iterator[Finding]:
    """Ranks that do not move and wait for nobody that is known."""
    if not ranks:
        return
    told = " ".join(_whereabouts(rank, records) for rank in ranks[:8])
    if len(ranks) > 8:
        told += f" ({len(ranks) - 8} more.)"
    begin = "" if alone else f"{_ranks(ranks)} {_verb(ranks, 'does', 'do')} not move and wait for no other rank. "
    yield Finding("stuck", begin + told, tuple(ranks))


def _went_on(records: Records) -> Finding:
    seconds = max(r.get("went_on_after", 0.0) for r in records.values())
    step = max(r["step"] for r in records.values())
    causes = diagnose({rank: r | {"state": "stuck"} for rank, r in records.items()})
    message = f"the run stood still for about {seconds:.0f} s in step {step} and then went on. Before that: "
    return Finding("slow", message + " ".join(f.message for f in causes), causes[0].ranks if causes else ())


def _whereabouts(rank: int, records: Records) -> str:
    """A sentence: where a rank's main thread is."""
    record = records.get(rank)
    if record is None:
        return f"Rank {rank} {_absence(rank, records)}."
    frames = record["threads"][0]["frames"] if record["threads"] else []
    if any(frame["file"].endswith("/bdb.py") for frame in frames):
        where = next((f for f in reversed(frames) if not re.search(r"/(bdb|pdb|cmd)\.py$", f["file"])), None)
        return f"Rank {rank} is stopped in a debugger at {place(where)}."
    where = _innermost(record)
    code = f": `{where['code']}`" if where and where.get("code") else ""
    region = f", in {record['region']}" if record.get("region") else ""
    step = f" (step {record['step']}, {record['phase']}{region})" if record.get("phase") else ""
    lock = ", which holds Python's lock, so that no other thread runs" if record.get("held_lock") else ""
    return f"The main thread of rank {rank} is at {place(where)}{code}{lock}{step}."


def _innermost(record: Record) -> dict[str, Any] | None:
    """The innermost frame that is neither torch's nor of Python's own library, or the innermost at all."""
    frames: list[dict[str, Any]] = record["threads"][0]["frames"] if record["threads"] else []
    own = [f for f in frames if not _INNER_FILE.search(f["file"]) and not _PYTHON_FILE.search(f["file"])]
    return (own or frames or [None])[-1]  # type: ignore[list-item]


def _is_in_a_wait(record: Record) -> bool:
    if record.get("state") == "failed":
        return True  # of the collective that failed
    frames = record["threads"][0]["frames"] if record["threads"] else []
    if not frames:
        return True
    last = frames[-1]
    return bool(_INNER_FILE.search(last["file"]) or _WAITING_CALL.search(last["code"]))


def _absence(rank: int, records: Records) -> str:
    for record in records.values():
        note = record.get("left", {}).get(str(rank))
        if note is not None:
            why = f" because of {note['error']}" if note.get("error") else " without an error"
            return f"left the run in step {note['step']} ({note['phase']}){why}"
    return "left no record: died, did not start, or writes to another disk"


def _last_number(record: Record | None, group: str) -> int:
    if record is None:
        return 0
    return max((entry["number"] for entry in record["collectives"] if entry["group"] == group), default=0)


def _reached(rank: int, number: int, records: Records) -> str:
    if rank not in records:
        return ""
    return f": rank {rank} is at number {number}" if number else f": rank {rank} has called none of this group"


def _members(record: Record, group: str) -> list[int]:
    return list(record["groups"].get(group, {}).get("ranks", range(record["world_size"])))


def _group(record: Record, entry: dict[str, Any]) -> str:
    known = record["groups"].get(entry["group"], {})
    axis = known.get("axis") or entry.get("axis") or "?"
    members = _ranks(_members(record, entry["group"]))
    return f"the group of all ranks ({members})" if axis == "default_pg" else f"group {axis} ({members})"


def _sizes(entry: dict[str, Any]) -> str:
    return " ".join(f"{size} {dtype}" for size, dtype in zip(entry["sizes"], entry["dtypes"])) or "without tensors"


def _verb(ranks: list[int], one: str, several: str) -> str:
    return one if len(ranks) == 1 else several


def _ranks(ranks: list[int] | tuple[int, ...]) -> str:
    """rank 3; ranks 0, 1; ranks 0-7."""
    ordered = sorted(ranks)
    if len(ordered) > 3 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"ranks {ordered[0]}-{ordered[-1]}"
    shown = ", ".join(map(str, ordered[:16])) + (", ..." if len(ordered) > 16 else "")
    return f"{'rank' if len(ordered) == 1 else 'ranks'} {shown}"
