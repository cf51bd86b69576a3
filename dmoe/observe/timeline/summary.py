"""From the files of all ranks to one summary. Ranks meet in files, so that a run that fails still leaves its timeline.

rank0.json ...    {"rank", "device", "first": the process's first step, "closed": whether it is the last version,
                  "steps": [number, ...], "seconds": [of each step], "regions": {name: [of each step]},
                  "waiting": {name: [of each step]}, "spans": {step: [[region, waiting, start, end], ...]},
                  "host_regions": on a GPU, {name: [of each step]} by the clock of the host}
summary.json      what `summarize` returns
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.observe.timeline.stragglers import Array, Late, find_stragglers

WINDOW = 100
"""Steps in which a straggler is looked for at once."""


@dataclass(frozen=True)
class RankFile:
    """One rank's steps, in order."""

    rank: int
    content: dict[str, Any]

    @property
    def steps(self) -> list[int]:
        return self.content["steps"]

    def seconds(self, steps: list[int]) -> Array:
        return self._of(self.content["seconds"], steps)

    def parts(self, kind: str, name: str, steps: list[int]) -> Array:
        """Seconds of one region in "regions", "waiting" or "host_regions"; 0 if it never was."""
        values = self.content[kind].get(name)
        return np.zeros(len(steps)) if values is None else self._of(values, steps)

    def _of(self, values: list[float], steps: list[int]) -> Array:
        index = {step: i for i, step in enumerate(self.steps)}
        return np.array([values[index[step]] for step in steps], dtype=np.float64)


def read_ranks(folder: Path, ranks: Iterable[int]) -> list[RankFile]:
    """The files that are there."""
    files = []
    for rank in ranks:
        path = folder / f"rank{rank}.json"
        if path.exists():
            files.append(RankFile(rank, json.loads(path.read_text(encoding="utf-8"))))
    return files


def common_steps(files: list[RankFile]) -> list[int]:
    """Steps that every file has, but for the first of a process, which takes longer, unless it is the only one."""
    steps = sorted(set.intersection(*(set(file.steps) for file in files))) if files else []
    return [step for step in steps if len(steps) == 1 or all(step != file.content["first"] for file in files)]


class Stragglers:
    """Those found so far in the windows of a run, each rank and region once."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, str], dict[int, float]] = {}

    def look(self, files: list[RankFile]) -> list[dict[str, Any]]:
        """Look at the last window; returns those whose rank and region were not found before."""
        steps = common_steps(files)[-WINDOW:]
        new = []
        for late in _find(files, steps):
            key = files[late.rank].rank, late.region
            if key not in self._behind:
                new.append(key)
            self._behind.setdefault(key, {}).update(late.seconds_behind)
        return [self._entry(*key) for key in new]

    def entries(self) -> list[dict[str, Any]]:
        """As `summarize` wants them, those that cost most first."""
        return sorted((self._entry(*key) for key in self._behind), key=lambda e: -e["seconds_behind"] * e["steps"])

    def _entry(self, rank: int, region: str) -> dict[str, Any]:
        behind = self._behind[rank, region]
        mean = sum(behind.values()) / len(behind)
        return {"rank": rank, "seconds_behind": mean, "region": region, "steps": len(behind)}


def _find(files: list[RankFile], steps: list[int]) -> list[Late]:
    if not steps:
        return []
    busy = {
        name: np.stack([f.parts("regions", name, steps) - f.parts("waiting", name, steps) for f in files])
        for name in region_names(files)
    }
    return find_stragglers(steps, np.stack([file.seconds(steps) for file in files]), busy)


def region_names(files: list[RankFile]) -> list[str]:
    """Every region of any rank, in the order in which it was first heard."""
    return list(dict.fromkeys(name for file in files for name in file.content["regions"]))


def summarize(files: list[RankFile], stragglers: list[dict[str, Any]], num_ranks: int) -> dict[str, Any] | None:
    """Means over `common_steps`; None if there are none.

    Returns:
        "ranks" how many ranks are in it, "rank_ids" which, "missing" of which there is no file; "steps" first and last;
        "regions" {name: seconds a step, for each rank} without nested regions, with the waits inside, which add up to
        "step_seconds"; "waiting" seconds of those that a rank waited for collectives, "waiting_in" the same by region;
        on a GPU "host_regions", by the clock of the host; "stragglers" [{"rank", "region", "seconds_behind" in each of
        "steps" steps}].
    """
    steps = common_steps(files)
    if not steps:
        return None

    def means(kind: str) -> dict[str, list[float]]:
        return {n: [float(f.parts(kind, n, steps).mean()) for f in files] for n in region_names(files)}

    waiting_in = means("waiting")
    present = [file.rank for file in files]
    summary = {
        "ranks": len(files),
        "rank_ids": present,
        "missing": [rank for rank in range(num_ranks) if rank not in present],
        "device": files[0].content["device"],
        "steps": [steps[0], steps[-1]],
        "regions": means("regions"),
        "step_seconds": [float(file.seconds(steps).mean()) for file in files],
        "waiting": [sum(values) for values in zip(*waiting_in.values())],
        "waiting_in": waiting_in,
        "stragglers": stragglers,
    }
    if all("host_regions" in file.content for file in files):
        summary["host_regions"] = means("host_regions")
    return summary
