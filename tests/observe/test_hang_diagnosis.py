"""The sentences about hand-made records of ranks."""

from __future__ import annotations

from typing import Any

from dmoe.observe.hang.diagnosis import diagnose

TORCH = "/x/site-packages/torch/distributed/distributed_c10d.py"
ALL = {"axis": "default_pg", "ranks": [0, 1, 2, 3]}


def frame(file: str, line: int, function: str, code: str = "") -> dict[str, Any]:
    return {"file": file, "line": line, "function": function, "code": code}


def call(
    number: int, *, group: str = "0", kind: str = "all_reduce", size: int = 4, state: str = "completed", line: int = 1,
    seconds: float = 9.0,
) -> dict[str, Any]:  # fmt: skip
    return {
        "group": group, "axis": "?", "number": number, "kind": kind, "call": kind, "sizes": [[size]],
        "dtypes": ["Float"], "state": state, "seconds": seconds, "where": frame("step.py", line, "step"),
    }  # fmt: skip


def note(kind: str, peer: int, number: int, state: str, line: int = 7) -> dict[str, Any]:
    return {
        "kind": kind, "group": "pp", "peer": peer, "number": number, "sizes": [[2]], "state": state, "seconds": 8.0,
        "where": frame("pipe.py", line, "step"),
    }  # fmt: skip


def record(
    rank: int, collectives: list[dict[str, Any]], *, at: dict[str, Any] | None = None, world: int = 4, **more: Any
) -> dict[str, Any]:
    """A rank whose main thread is `at`, or in a call of torch if there is a collective under way."""
    waits = any(c["state"] != "completed" for c in collectives) or "messages" in more
    own = frame("step.py", 1, "step", "dist.all_reduce(x)")
    frames = [own, frame(TORCH, 5, "wait", "work.wait()")] if waits else [frame("model.py", 3, "forward", "y = x * 2")]
    frames = frames if at is None else [own, at]
    return {
        "rank": rank, "world_size": world, "host": "h", "pid": 1, "time": 0.0, "reason": "has not moved",
        "state": "stuck", "step": 5, "phase": "step", "region": "backward", "seconds": 10.0, "left": {}, "messages": [],
        "threads": [{"name": "MainThread", "main": True, "frames": frames}],
        "groups": {"0": ALL | {"ranks": list(range(world))}}, "collectives": collectives,
    } | more  # fmt: skip


def test_no_records() -> None:
    assert diagnose({}) == []


def test_missing_rank() -> None:
    waiting = [call(6), call(7, state="waiting", line=20)]
    sleeping = frame("load.py", 33, "read", "time.sleep(9)")
    records = {r: record(r, waiting) for r in (0, 1, 3)} | {2: record(2, [call(6)], at=sleeping, region="data")}
    (finding,) = diagnose(records)
    assert (finding.kind, finding.ranks) == ("missing", (2,))
    assert finding.message == (
        "rank 2 did not come to all_reduce number 7 of the group of all ranks (ranks 0-3), where ranks 0, 1, 3 wait "
        "since 9.0 s, called at step.py:20 (step): rank 2 is at number 6. The main thread of rank 2 is at load.py:33 "
        "(read): `time.sleep(9)` (step 5, step, in data)."
    )


def test_waiting_inside_a_tool_that_listens_is_waiting() -> None:
    """The wait itself has no Python frame: the innermost is that of the timeline, or of the account of the memory."""
    for tool in ("timeline/waits.py", "memory/accounting.py"):
        waiting = frame(f"/x/dmoe/observe/{tool}", 42, "wait", "return function(*args, **kwargs)")
        sleeping = frame("load.py", 33, "read", "time.sleep(9)")
        records = {0: record(0, [call(6), call(7, state="waiting")], at=waiting, world=2)}
        records[1] = record(1, [call(6)], at=sleeping, world=2)
        (finding,) = diagnose(records)
        assert (finding.kind, finding.ranks) == ("missing", (1,))


def test_rank_with_a_collective_under_way_that_is_in_python() -> None:
    """It called one that nobody has come to yet and then went to sleep: it does not wait for them, they for it."""
    sleeping = frame("load.py", 33, "read", "time.sleep(9)")
    ahead = record(1, [call(3), call(1, group="ep", state="waiting")], at=sleeping)
    records = {0: record(0, [call(3), call(4, state="waiting")]), 1: ahead}
    records = {
        r: x | {"world_size": 2, "groups": {g: {"axis": g, "ranks": [0, 1]} for g in ("0", "ep")}}
        for r, x in records.items()
    }
    (finding,) = diagnose(records)
    assert finding.ranks == (1,)


def test_subgroups_and_consequences() -> None:
    groups = {"0": ALL, "3": {"axis": "ep", "ranks": [0, 1]}, "4": {"axis": "ep", "ranks": [2, 3]}}
    in_ep = [call(2), call(9, group="4", kind="all_to_all", state="waiting", line=44)]
    records = {
        0: record(0, [call(2), call(8, group="3"), call(3, state="waiting", seconds=99.0)], groups=groups),
        1: record(1, [call(2), call(8, group="3"), call(3, state="waiting", seconds=99.0)], groups=groups),
        2: record(2, [call(2), call(8, group="4")], groups=groups),
        3: record(3, in_ep, groups=groups),
    }
    (finding,) = diagnose(records)
    assert finding.ranks == (2,)
    assert finding.message.startswith(
        "rank 2 did not come to all_to_all number 9 of group ep (ranks 2, 3), where rank 3"
    )
    assert "called at step.py:44 (step): rank 2 is at number 8." in finding.message
    assert "As a consequence ranks 0, 1 wait: rank 0 in all_reduce number 3" in finding.message


def test_two_groups_that_happen_to_be_at_the_same_number() -> None:
    """Numbers of different groups are not compared."""
    groups = {"0": ALL, "3": {"axis": "ep", "ranks": [0, 1]}, "4": {"axis": "ep", "ranks": [2, 3]}}
    records = {
        rank: record(
            rank, [call(5, group="3" if rank < 2 else "4", size=rank // 2 + 1, state="waiting")], groups=groups
        )
        for rank in range(4)
    }
    assert [f.kind for f in diagnose(records)] == ["stuck"]


def test_mismatch_of_kinds_and_of_sizes() -> None:
    for other in (call(7, kind="broadcast", state="waiting", line=30), call(7, size=5, state="waiting", line=30)):
        records = {r: record(r, [call(7, state="waiting", line=20)]) for r in (0, 1, 3)} | {2: record(2, [other])}
        (finding,) = diagnose(records)
        assert (finding.kind, finding.ranks) == ("mismatch", (2,))
        assert (
            "disagree in collective number 7: ranks 0, 1, 3 called all_reduce [4] Float at step.py:20"
            in finding.message
        )
        assert f"rank 2 called {other['call']} {other['sizes'][0]} Float at step.py:30" in finding.message


def test_uneven_exchanges_are_no_mismatch() -> None:
    records = {r: record(r, [call(7, kind="all_to_all", size=r, state="waiting")]) for r in range(4)}
    assert [f.kind for f in diagnose(records)] == ["stuck"]


def test_dead_rank() -> None:
    records = {r: record(r, [call(7, state="waiting")]) for r in (0, 1, 2)}
    (finding,) = diagnose(records)
    assert (finding.kind, finding.ranks) == ("missing", (3,))
    assert finding.message.count("left no record") == 1
    assert finding.message.endswith("Rank 3 left no record: died, did not start, or writes to another disk.")


def test_dead_rank_that_nobody_waits_for_yet() -> None:
    (stuck_or_silent, *rest) = diagnose({r: record(r, [call(7)]) for r in (0, 1, 2)})
    assert stuck_or_silent.kind == "no record"
    assert stuck_or_silent.ranks == (3,)
    assert [f.kind for f in rest] == ["stuck"]


def test_rank_that_left() -> None:
    left = {"3": {"step": 4, "phase": "step", "error": "OSError: disk full"}}
    failed, missing = diagnose({r: record(r, [call(7, state="waiting")], left=left) for r in (0, 1, 2)})
    assert failed.message == "rank 3 left the run in step 4 because of OSError: disk full."
    assert "left the run in step 4 (step) because of OSError: disk full." in missing.message


def test_failed_rank_first() -> None:
    broken = record(0, [call(7, state="waiting")], state="failed", reason="failed: RuntimeError: timed out")
    sleeping = record(1, [call(6)], at=frame("load.py", 33, "read", "time.sleep(9)"), state="heard")
    records = {0: broken, 1: sleeping}
    records = {r: x | {"world_size": 2, "groups": {"0": ALL | {"ranks": [0, 1]}}} for r, x in records.items()}
    failed, missing = diagnose(records)
    assert failed.message == "rank 0 failed: RuntimeError: timed out in step 5, at step.py:1 (step)."
    assert (missing.kind, missing.ranks) == ("missing", (1,))


def test_message_that_was_not_sent() -> None:
    pp = {"pp": {"axis": "pp", "ranks": [0, 1]}}
    busy = frame("model.py", 3, "forward", "y = x * 2")
    sender = record(0, [], at=busy, world=2, groups=pp, messages=[note("send", 1, 1, "completed")])
    receiver = record(
        1, [], world=2, groups=pp, messages=[note("recv", 0, 1, "completed"), note("recv", 0, 2, "waiting", line=70)]
    )
    (finding,) = diagnose({0: sender, 1: receiver})
    assert finding.ranks == (0,)
    assert finding.message.startswith(
        "rank 0 did not come to recv number 2 from rank 0 in group pp (ranks 0, 1), where rank 1"
    )
    assert "called at pipe.py:70 (step): rank 0 has sent 1 of them." in finding.message
    # Sent and merely not taken yet, as gloo tells only those who wait: nobody is missing.
    sent = sender | {"messages": [note("send", 1, 1, "completed"), note("send", 1, 2, "completed")]}
    assert [f.kind for f in diagnose({0: sent, 1: receiver})] == [
        "stuck",
    ]


def test_receive_that_nobody_asks_for() -> None:
    pp = {"pp": {"axis": "pp", "ranks": [0, 1]}}
    sender = record(0, [], world=2, groups=pp, messages=[note("send", 1, 1, "waiting")])
    (finding,) = diagnose({0: sender, 1: record(1, [], world=2, groups=pp)})
    assert finding.ranks == (1,)
    assert "rank 1 has asked for 0 of them" in finding.message


def test_circle() -> None:
    groups = {"a": {"axis": "ep", "ranks": [0, 1]}, "b": {"axis": "tp", "ranks": [0, 1]}}
    first = record(0, [call(1, group="a", state="waiting", line=11)], world=2, groups=groups)
    second = record(1, [call(1, group="b", state="waiting", line=12)], world=2, groups=groups)
    (finding,) = diagnose({0: first, 1: second})
    assert (finding.kind, finding.ranks) == ("circle", (0, 1))
    assert (
        "rank 0 waits for rank 1 in all_reduce number 1 of group ep (ranks 0, 1), called at step.py:11"
        in finding.message
    )
    assert (
        "rank 1 waits for rank 0 in all_reduce number 1 of group tp (ranks 0, 1), called at step.py:12"
        in finding.message
    )


def test_all_compute() -> None:
    (finding,) = diagnose({r: record(r, [call(7)]) for r in range(4)})
    assert finding.kind == "stuck"
    assert finding.message.startswith(
        "ranks 0-3 do not move and wait for no other rank. The main thread of rank 0 is at"
    )
    assert "model.py:3 (forward): `y = x * 2`" in finding.message


def test_one_process() -> None:
    (finding,) = diagnose({0: record(0, [], world=1, groups={})})
    assert finding.message.startswith("The main thread of rank 0 is at model.py:3 (forward)")


def test_debugger_and_held_lock() -> None:
    frames = [
        frame("train.py", 8, "f", "breakpoint()"),
        frame("/lib/bdb.py", 1, "trace"),
        frame("/lib/pdb.py", 2, "ask"),
    ]
    stopped = record(1, [call(6)]) | {"threads": [{"name": "MainThread", "main": True, "frames": frames}]}
    held = record(2, [call(6)], held_lock=True)
    records = {0: record(0, [call(7, state="waiting")], world=3), 1: stopped, 2: held}
    records = {r: x | {"world_size": 3, "groups": {"0": ALL | {"ranks": [0, 1, 2]}}} for r, x in records.items()}
    messages = [f.message for f in diagnose(records)]
    assert any("Rank 1 is stopped in a debugger at train.py:8 (f)." in m for m in messages)
    assert any("rank 2 is at model.py:3 (forward): `y = x * 2`, which holds Python's lock" in m for m in messages)


def test_place_is_neither_in_torch_nor_in_the_library() -> None:
    frames = [frame("mine.py", 4, "load"), frame("/usr/lib/python3.11/threading.py", 9, "wait"), frame(TORCH, 3, "f")]
    rank = record(0, [], world=1, groups={}) | {"threads": [{"name": "MainThread", "main": True, "frames": frames}]}
    assert "rank 0 is at mine.py:4 (load)" in diagnose({0: rank})[0].message


def test_went_on() -> None:
    records = {r: record(r, [call(7, state="waiting")]) for r in (0, 1, 3)} | {2: record(2, [call(6)])}
    records = {r: x | {"state": "went on", "went_on_after": 12.0 + r} for r, x in records.items()}
    (finding,) = diagnose(records)
    assert finding.kind == "slow"
    assert "about 15 s in step 5 and then went on. Before that: rank 2 did not come to" in finding.message
