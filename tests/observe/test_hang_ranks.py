"""Real ranks that hang: the rank that did not come and the place where it is, as `dmoe doctor RUN` says it."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import hang_worker
from ranks import run_ranks

from dmoe.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks wrote in each case, all in one launch."""
    folder = tmp_path_factory.mktemp("hangs")
    run_ranks(hang_worker.rank_main, (str(folder),), hang_worker.WORLD)
    return folder


@pytest.fixture
def doctor(runs: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], list[str]]:
    def lines(case: str) -> list[str]:
        assert main(["doctor", str(runs / case)]) == 1
        return capsys.readouterr().out.splitlines()

    return lines


def line_of(function: Callable[..., object], code: str) -> int:
    """Number of the first line of a function that has `code`."""
    source, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(source) if code in line)


SLEEP = f"hang_worker.py:{line_of(hang_worker.keep, 'time.sleep')} (keep): `time.sleep(0.05)`"


def test_all_reduce_that_one_rank_does_not_come_to(doctor) -> None:
    (line,) = doctor("skipped")
    assert line.startswith("missing: rank 1 did not come to all_reduce number 3 of the group of all ranks (ranks 0-3)")
    assert "where ranks 0, 2, 3 wait since" in line
    assert f"hang_worker.py:{line_of(hang_worker.skipped, 'all_reduce')} (skipped): rank 1 is at number 2." in line
    assert "The main thread of rank 1 is at" in line
    assert SLEEP in line
    assert "(step 2, step, in backward)" in line


def test_exchange_in_a_group_of_two(doctor) -> None:
    """A functional collective; that the others wait in an object collective is a consequence."""
    (line,) = doctor("subgroup")
    assert line.startswith("missing: rank 2 did not come to all_to_all number 1 of group ep (ranks 2, 3), where rank 3")
    assert "rank 2 has called none of this group" in line
    assert SLEEP in line
    assert "As a consequence ranks 0, 1 wait: rank 0 in all_gather number " in line


def test_data_loading_with_a_collective_under_way(doctor) -> None:
    (line,) = doctor("loading")
    assert line.startswith("missing: rank 3 did not come to all_reduce number ")
    assert "where ranks 0, 1, 2 wait" in line
    assert "(step 2, step, in data)" in line


def test_message_of_a_pipeline(doctor) -> None:
    (line,) = doctor("pipeline")
    assert line.startswith("missing: rank 0 did not come to recv number 2 from rank 0 in group pp (ranks 0, 2), ")
    assert "rank 0 has sent 1 of them" in line
    assert "As a consequence ranks 1, 3 wait: rank 1 in barrier" in line


def test_collectives_that_do_not_match(doctor) -> None:
    (line,) = doctor("crossed")
    assert line.startswith("mismatch: the ranks of the group of all ranks (ranks 0-3) disagree in collective number ")
    assert f"ranks 0, 1, 3 called all_reduce [7] Float at {hang_worker.__file__}:" in line
    assert f"rank 2 called broadcast [9] Float at {hang_worker.__file__}:" in line


def test_collective_that_failed_before_the_timeout_of_the_watch(doctor) -> None:
    *failed, missing = doctor("timed_out")
    # One that hears of the first failure before its own comes has written that.
    ranks = [re.match(r"failed: rank ([023]) failed: RuntimeError", line)[1] for line in failed]
    assert ranks == sorted(set(ranks))
    assert ranks
    assert f"hang_worker.py:{line_of(hang_worker.timed_out, 'all_reduce')} (timed_out)" in failed[0]
    assert re.match(r"missing: rank 1 did not come to all_reduce number 1 of group \d+ \(ranks 0-3\)", missing)
    assert SLEEP in missing


def test_run_that_went_on(doctor) -> None:
    (line,) = doctor("recovered")
    assert re.match(
        r"slow: the run stood still for about \d+ s in step 2 and then went on. Before that: rank 1 did", line
    )


def test_soon_after_the_timeout(runs: Path) -> None:
    for case in ("skipped", "subgroup", "loading", "pipeline"):
        for path in (runs / case / "hang").glob("rank*.json"):
            assert json.loads(path.read_text())["seconds"] < 5 * hang_worker.TIMEOUT


def test_json(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(runs / "subgroup"), "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["kind"], finding["ranks"]) == ("missing", [2])


def test_text_for_people(runs: Path) -> None:
    text = (runs / "pipeline" / "hang" / "rank2.txt").read_text()
    assert "recv number 2 from rank 0: [[5]] waiting" in text
    assert "in pipeline\n    dist.recv(torch.ones(5), 0, group=group)" in text


def test_empty_files_are_removed(runs: Path) -> None:
    assert list((runs / "skipped-live" / "hang").glob("rank*.json"))
    assert not list((runs / "skipped-live" / "hang").glob("*.locked.txt"))
