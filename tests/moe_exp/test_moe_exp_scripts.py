"""The scripts as a person starts them: processes, ports, exit codes and what they print."""

import socket
import time
from pathlib import Path

import pytest
from script_launch import diagnosis, free_port, start, torchrun


def test_utils_right_despite_exported_variables() -> None:
    result = torchrun("utils.py", LOCAL_RANK=0, WORLD_SIZE=2)
    assert result.returncode == 0, result.stderr
    host = socket.gethostname()
    for rank in (0, 1):
        assert f"rank {rank} of 2: host {host}" in result.stdout
        assert f"local rank {rank}, device" in result.stdout
        assert f"rank {rank}: all-reduce, all-to-all, broadcast right" in result.stdout


def test_all_to_all_example_and_sweep() -> None:
    result = torchrun("test_all_to_all.py", "--verify")
    assert result.returncode == 0, result.stderr
    for form in ("list form", "single form"):
        assert f"rank 0 after, {form}: [[0, 1], [10, 11, 12]]" in result.stdout
        assert f"rank 1 after, {form}: [[2, 3, 4], [13, 14, 15]]" in result.stdout
    if "plot: " in result.stdout and "gloo" in result.stdout:
        assert "refuses unequal sizes" in result.stdout
    assert "16 MiB" in result.stdout
    picture = Path(result.stdout.split("plot: ")[1].strip())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_missing_ranks_are_named_within_30_s() -> None:
    shared = {"WORLD_SIZE": 4, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = time.monotonic()
    processes = [start("utils.py", RANK=0, **shared), start("utils.py", RANK=2, **shared)]
    for process in processes:
        assert "ranks 1, 3 of WORLD_SIZE 4 did not arrive" in diagnosis(process)
    assert time.monotonic() - started < 60  # 30 s and two starts of Python on a busy machine


def test_wrong_settings_are_named() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as busy:
        taken = busy.getsockname()[1]
        base = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        cases = [
            (base | {"RANK": 0, "MASTER_PORT": taken}, f"MASTER_PORT is {taken}: busy"),
            (base | {"RANK": 0, "MASTER_ADDR": "no-such-host.invalid"}, "'no-such-host.invalid': cannot be resolved"),
            (base | {"RANK": 2}, "RANK is 2 and WORLD_SIZE is 2: more processes were started"),
            ({"WORLD_SIZE": 2, "LOCAL_RANK": 0}, "not set: start it with torchrun, e.g. torchrun --nproc_per_node=2"),
            (base | {"RANK": "x"}, "RANK is 'x': must be a whole number"),
        ]
        for values, expected in cases:
            assert expected in diagnosis(start("utils.py", **values))


@pytest.mark.parametrize("sizes", [(2, 3)])
def test_world_sizes_that_differ(sizes: tuple[int, int]) -> None:
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = [start("utils.py", RANK=rank, WORLD_SIZE=size, **shared) for rank, size in enumerate(sizes)]
    for process in processes:
        assert "was started with WORLD_SIZE 3, rank 0 with 2" in diagnosis(process)
