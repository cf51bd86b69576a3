"""On real ranks: a rank that is slowed down is named, with the region in which it is, and no other rank is; and each
rank writes its trace."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import timeline_worker
from ranks import run_ranks
from timeline_worker import NAP, RUNS, STEPS


@pytest.mark.parametrize("world", [2, 4])
def test_slow_rank_is_named(world: int, tmp_path: Path) -> None:
    run_ranks(timeline_worker.rank_main, (world, str(tmp_path)), world)
    for name, planted in RUNS[world].items():
        folder = tmp_path / name / "profiling" / "timeline"
        if planted.traced:
            for rank in range(world):
                check_trace(folder.parent / "trace" / f"rank{rank}.json.gz", rank, world)
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["ranks"] == world, name
        assert summary["steps"] == [2, STEPS], name
        found = [(s["rank"], s["region"]) for s in summary["stragglers"]]
        assert found == ([(planted.rank, planted.where)] if planted.where else []), (name, summary)
        for rank in range(world):
            parts = sum(values[rank] for values in summary["regions"].values())
            assert parts == pytest.approx(summary["step_seconds"][rank], rel=1e-3), name
        assert {"data", "forward", "backward", "routing", "experts", "optimizer"} <= summary["regions"].keys(), name
        if planted.where:
            assert summary["stragglers"][0]["seconds_behind"] > 0.5 * NAP, name
            assert summary["stragglers"][0]["steps"] >= 3, name
            # All ranks take as long as the slow one, and that one waits least.
            assert min(summary["step_seconds"]) > NAP, name
            assert min(range(world), key=summary["waiting"].__getitem__) == planted.rank, name
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], name


def check_trace(path: Path, rank: int, world: int) -> None:
    with gzip.open(path) as file:
        trace = json.load(file)
    info = trace["distributedInfo"]
    assert (info["rank"], info["world_size"], info["backend"]) == (rank, world, "gloo")
    assert {"dmoe/backward", "dmoe/experts", "dmoe/exchange"} <= {e.get("name") for e in trace["traceEvents"]}
    assert not [other for other in path.parent.iterdir() if other.name.startswith(".")]
