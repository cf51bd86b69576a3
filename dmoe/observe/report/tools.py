"""What the tools that watch a run left in its directory: timeline, account of the memory, traces, and what went wrong.

Another version of a tool, or a process that was killed, may have left something else than is expected here: what
cannot be used is left out, because the rest of the page is still right.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dmoe.errors import RunError
from dmoe.observe.report.run import Run, read_json

_TROUBLE = re.compile(r"not finite|non-finite|\bnan\b|\binf\b|damaged|refused|out of memory", re.IGNORECASE)


def load_timeline(run_dir: Path) -> dict[str, Any]:
    """RUN/profiling/timeline/summary.json; empty if it is absent or has no times of ranks."""
    summary = read_json(run_dir / "profiling" / "timeline" / "summary.json")
    seconds, regions = summary.get("step_seconds"), summary.get("regions")
    if not isinstance(seconds, list) or not _numbers(seconds) or not isinstance(regions, dict):
        return {}
    kept = {name: values for name, values in regions.items() if _numbers(values, len(seconds))}
    waiting = summary.get("waiting")
    stragglers = [s for s in summary.get("stragglers") or [] if isinstance(s, dict) and "rank" in s]
    waiting = waiting if _numbers(waiting, len(seconds)) else []
    names = summary.get("rank_ids")
    names = names if _numbers(names, len(seconds)) else list(range(len(seconds)))
    return summary | {"regions": kept, "waiting": waiting, "stragglers": stragglers, "rank_ids": names}


def _numbers(values: Any, length: int | None = None) -> bool:
    right = isinstance(values, list) and len(values) > 0 and all(isinstance(v, (int, float)) for v in values)
    return right and (length is None or len(values) == length)


def load_memory(run_dir: Path) -> dict[str, Any]:
    """RUN/profiling/memory/summary.json with "worst", the rank with the highest peak, and "rows", the categories of
    that rank beside those of the estimate; empty if it is absent."""
    summary = read_json(run_dir / "profiling" / "memory" / "summary.json")
    given = summary.get("ranks")
    ranks: list[dict[str, Any]] = [
        {"rank": i, "categories": {}, "phases": {}, "curve": []} | rank
        for i, rank in enumerate(given if isinstance(given, list) else [])
        if isinstance(rank, dict) and isinstance(rank.get("peak_bytes"), (int, float))
    ]
    if not ranks:
        return {}
    worst = max(ranks, key=lambda rank: rank["peak_bytes"])
    # Ranks may differ in their estimates; the summary's own is that of the first.
    own = worst["estimate"] if isinstance(worst.get("estimate"), dict) else _estimate(summary)
    estimate = {name: value for name, value in own.items() if isinstance(value, (int, float))}
    known = dict.fromkeys([*worst["categories"], *estimate])
    names = [name for name in known if worst["categories"].get(name) or estimate.get(name)]
    rows = [{"category": n, "measured": worst["categories"].get(n), "estimate": estimate.get(n)} for n in names]
    total = {"category": "total", "measured": worst["peak_bytes"], "estimate": sum(estimate.values()) or None}
    return summary | {"ranks": ranks, "worst": worst, "estimate": estimate, "rows": [*rows, total]}


def _estimate(summary: dict[str, Any]) -> dict[str, Any]:
    estimate = summary.get("estimate")
    if isinstance(estimate, dict) and isinstance(estimate.get("categories"), dict):
        estimate = estimate["categories"]
    return estimate if isinstance(estimate, dict) else {}


def links(run_dir: Path) -> list[dict[str, str]]:
    """Files of the profilers, with addresses relative to the run directory: "href", "name", "what"."""
    found = []
    for folder, what in (
        ("profiling/trace", "trace: open in chrome://tracing or Perfetto; .txt are tables of operators"),
        ("profiling/timeline", "timeline of the ranks"),
        ("profiling/memory", "account of the memory"),
    ):
        for path in sorted((run_dir / folder).glob("*")):
            if path.is_file() and not path.name.startswith("."):
                found.append({"href": f"{folder}/{quote(path.name)}", "name": f"{folder}/{path.name}", "what": what})
    return found


def problems(run: Run) -> list[dict[str, str]]:
    """What went wrong in the run, worst first: "message", and "href" where a file says more."""
    found = _hangs(run.folder)
    for path in sorted((run.folder / "profiling" / "memory").glob("oom_rank*.txt")):
        message = f"memory ran out on {path.stem.removeprefix('oom_').replace('rank', 'rank ')}"
        found.append({"message": message, "href": f"profiling/memory/{quote(path.name)}"})
    for event in run.events:
        message = str(event.get("message", ""))
        if _TROUBLE.search(message):
            found.append({"message": f"step {event['step']}: {message}", "href": ""})
    skipped = max((record.get("skipped_steps") or 0 for record in run.train), default=0)
    if skipped:
        message = (
            f"{skipped} step{'s were' if skipped > 1 else ' was'} skipped: the loss or the gradient was not finite"
        )
        found.append({"message": message, "href": ""})
    return found


def _hangs(run_dir: Path) -> list[dict[str, str]]:
    """What the records in RUN/hang say, and the files."""
    paths = [path for path in sorted((run_dir / "hang").glob("rank*")) if path.is_file()]
    if not paths:
        return []
    found = []
    try:
        from dmoe.observe.hang.diagnosis import diagnose  # brings torch
        from dmoe.observe.hang.record import read_records

        found = [{"message": finding.message, "href": ""} for finding in diagnose(read_records(run_dir))]
    except (RunError, KeyError, TypeError, ValueError) as error:
        found = [{"message": f"the records of a hang cannot be read: {error}".replace(f"{run_dir}/", ""), "href": ""}]
    files = [path for path in paths if path.suffix == ".txt"] or paths
    for path in files[:32]:
        found.append({"message": f"stacks and collectives of {path.name}", "href": f"hang/{quote(path.name)}"})
    return found
