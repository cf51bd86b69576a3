"""What else in a run directory names something that went wrong, as sentences."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dmoe.errors import RunError
from dmoe.observe.hang.diagnosis import Finding, diagnose
from dmoe.observe.hang.record import read_records
from dmoe.observe.metrics_log import read_metrics

# Events of a run that tell of no trouble are left out: it resumed, it was stopped by a signal.
_TROUBLE = re.compile(r"not finite|NaN|Inf|non-finite")


def run_findings(run_dir: Path) -> list[Finding]:
    """Everything that the files of a run name. Raises RunError where one is damaged."""
    # Memory first: the other ranks miss one that ran out of it.
    findings = memory_findings(run_dir) + diagnose(read_records(run_dir))
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        findings += non_finite_findings(read_metrics(metrics))
    timeline = run_dir / "profiling" / "timeline" / "summary.json"
    if timeline.exists():
        findings += straggler_findings(read_json(timeline))
    return findings


def straggler_findings(summary: dict[str, Any]) -> list[Finding]:
    """Ranks that keep the others waiting, from the summary of a timeline."""
    steps = summary.get("step_seconds") or []
    step = sum(steps) / len(steps) if steps else 0.0
    findings = []
    for straggler in summary.get("stragglers", []):
        rank, behind = straggler["rank"], straggler["seconds_behind"]
        share = f", {behind / step:.0%} of a step" if step else ""
        message = (
            f"rank {rank} keeps the others waiting: in {straggler['region']} it was {behind * 1000:.1f} ms behind"
            f"{share}, in each of {straggler['steps']} steps."
        )
        findings.append(Finding("straggler", message, (rank,)))
    return findings


def non_finite_findings(records: list[dict[str, Any]]) -> list[Finding]:
    """Steps whose loss or gradient was not finite, from the lines of metrics.jsonl."""
    findings = []
    for record in records:
        message = str(record.get("message", ""))
        if record.get("kind") == "event" and _TROUBLE.search(message):
            ranks = tuple(sorted({int(n) for n in re.findall(r"\brank (\d+)", message)}))
            findings.append(Finding("non-finite", f"step {record['step']}: {message}", ranks))
    skipped = max((record.get("skipped_steps") or 0 for record in records), default=0)
    if skipped and not findings:
        findings.append(Finding("non-finite", f"{skipped} steps were skipped: loss or gradient was not finite."))
    return findings


def memory_findings(run_dir: Path) -> list[Finding]:
    """Ranks whose memory ran out, by the files that the account of the memory left."""
    files: dict[int, list[Path]] = {}
    for path in sorted((run_dir / "profiling" / "memory").glob("oom_rank*")):
        match = re.match(r"oom_rank(\d+)\.", path.name)
        if match:
            files.setdefault(int(match[1]), []).append(path)
    findings = []
    for rank, paths in sorted(files.items()):
        reports = [read_json(path) for path in paths if path.suffix == ".json"]
        message = reports[0].get("message") if reports else None
        what = message or f"memory ran out; what held it: {', '.join(map(str, paths))}"
        findings.append(Finding("memory", f"rank {rank}: {what}", (rank,)))
    return findings


def read_json(path: Path) -> dict[str, Any]:
    """A file with an object. Raises RunError for one that is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"cannot read {path}: it does not hold a JSON object")
    return content
