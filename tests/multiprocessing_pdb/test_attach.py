"""The debugger without a terminal: skipped, waited for, attached to, and refused."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from multiprocessing_pdb.server import Server, request
from pseudo_terminal import environment

import multiprocessing_pdb
from multiprocessing_pdb import MultiprocessingPdb, messages, registry

PROGRAM = """
    import os
    from multiprocessing_pdb import MultiprocessingPdb
    Tra = MultiprocessingPdb().set_trace
    value = 10 + int(os.environ.get("RANK", "0"))
    Tra()
    value += 1
    print("value", value, flush=True)
"""


def start(folder: Path, code: str = PROGRAM, **env: str) -> subprocess.Popen[str]:
    path = folder / "program.py"
    path.write_text(textwrap.dedent(code))
    return subprocess.Popen(
        [sys.executable, str(path)], env=environment(folder, **env), stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def client(folder: Path, *arguments: str, lines: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "multiprocessing_pdb", *arguments], env=environment(folder), input=lines, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip


def wait_for(folder: Path, count: int) -> None:
    end = time.monotonic() + 30
    while len(list(folder.rglob("*.json"))) < count:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_nobody_can_attach_in_ci(tmp_path):
    process = start(tmp_path, CI="true")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "value 11\n")
    assert err.count("\n") == 2  # one line, after an empty one
    assert "CI is set: it goes on" in err


def test_nobody_comes(tmp_path):
    code = PROGRAM.replace("MultiprocessingPdb()", "MultiprocessingPdb(timeout=0.3)")
    out, err = start(tmp_path, code).communicate(timeout=60)
    assert out == "value 11\n"
    assert "multiprocessing_pdb attach" in err
    assert "nobody attached: it goes on" in err


def test_turned_off(tmp_path):
    out, err = start(tmp_path, MULTIPROCESSING_PDB="0").communicate(timeout=60)
    assert (out, err) == ("value 11\n", "")


def test_client_talks_to_ranks_in_turn(tmp_path):
    ranks = [start(tmp_path, RANK=str(r), WORLD_SIZE="2", MASTER_PORT="1234") for r in range(2)]
    wait_for(tmp_path, 2)
    listed = client(tmp_path, "list").stdout
    assert "job job-1234" in listed
    assert "rank 1/2" in listed
    everywhere = client(tmp_path, "attach", "job-1234", "all", "value", "*", "2").stdout
    assert [line.rpartition(" ")[2] for line in everywhere.splitlines()] == ["20", "22"]
    gone = client(tmp_path, "attach", "job-1234", "0", lines="p value\n")  # the input ends: the process waits on
    assert "\n10\n" in gone.stdout.replace("(Pdb rank 0/2 pid", "\n(Pdb")[0:] or "10" in gone.stdout
    assert ranks[0].poll() is None
    talk = client(tmp_path, "attach", "1", lines="value = 50\nrank 0\np value + 300\nall value\nc\n")
    assert "310" in talk.stdout
    assert ": 50" in talk.stdout
    assert ranks[0].communicate(timeout=60)[0] == "value 11\n"
    assert ranks[1].poll() is None
    client(tmp_path, "attach", "job-1234", lines="q\n")
    assert ranks[1].communicate(timeout=60)[0] == "value 51\n"
    assert all(process.returncode == 0 for process in ranks)
    assert not list(tmp_path.rglob("*.json"))
    assert not list(tmp_path.rglob("*.sock"))
    nobody = client(tmp_path, "attach")
    assert (nobody.returncode, nobody.stderr) == (1, "no job waits at a line\n")


def test_wrong_token_is_refused(tmp_path):
    seen = []
    server = Server(str(tmp_path / "s.sock"), "secret", lambda operation, text: seen.append(text) or "answer")
    stop = registry.Stop("0", "rank 0", os.getpid(), server.address, "secret", "here")
    assert request(stop, "eval", "1") == "answer"
    for token in ("", "Secret", "secret "):
        wrong = registry.Stop("0", "rank 0", os.getpid(), server.address, token, "here")
        assert "refused" in request(wrong, "eval", "2")
    nothing = messages.connect(server.address, 5)
    nothing.sock.sendall(b"not json\n")
    assert "refused" in nothing.receive()["error"]
    nothing.close()
    assert seen == ["1"]
    server.close()
    assert "no answer" in request(stop, "eval", "3")


def test_other_users_are_refused(tmp_path, monkeypatch):
    server = Server(str(tmp_path / "s.sock"), "secret", lambda operation, text: "answer")
    stop = registry.Stop("0", "rank 0", os.getpid(), server.address, "secret", "here")
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)  # so that the caller is somebody else
    assert "refused" in request(stop, "eval", "1")
    monkeypatch.undo()
    server.close()


def test_folder_that_others_can_read_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("MULTIPROCESSING_PDB_DIR", str(tmp_path))
    root = registry.root()
    assert root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o755)
    with pytest.raises(PermissionError, match="nobody else may read"):
        registry.root()


def test_long_paths_fall_back_to_the_loopback_address(tmp_path):
    sock, address = messages.listen(str(tmp_path / ("x" * 120)))
    assert address.startswith("127.0.0.1:")
    assert sock.family == socket.AF_INET
    sock.close()


def test_conditions(monkeypatch):
    stops = []
    monkeypatch.setattr(multiprocessing_pdb.Debugger, "set_trace", lambda self, frame: stops.append(frame.f_lineno))
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    MultiprocessingPdb(ranks=1).set_trace()
    MultiprocessingPdb(when=lambda: 0).set_trace()
    MultiprocessingPdb().set_trace(when=False)
    assert stops == []
    once = MultiprocessingPdb(ranks=[2, 3], once=True)
    once.set_trace()
    once.set_trace()
    MultiprocessingPdb(ranks=0).set_trace(ranks=2)
    assert len(stops) == 2
    with pytest.raises(ValueError, match='must be "all"'):
        MultiprocessingPdb(ranks="some")
