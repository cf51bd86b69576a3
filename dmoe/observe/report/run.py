"""What a run directory holds, read for the report: lines of metrics, configuration, and what other tools left there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dmoe.errors import ConfigError
from dmoe.observe.metrics_log import metrics_lines

Record = dict[str, Any]

# Long lists of numbers of a train line, kept as float32 arrays [layers, experts or ranks]: as lists, those of 10,000
# lines of 32 layers with 128 experts take more than a gigabyte.
_TABLES = ("expert_load", "rank_load")


@dataclass(frozen=True)
class Run:
    """What a run directory says, each kind of line in step order without the lines that a resume made void.

    `expert_load` and `rank_load` of a train line are float32 arrays [layers, experts or ranks], NaN where unknown.
    """

    folder: Path
    name: str
    config_text: str
    config: dict[str, Any]
    model: dict[str, Any]
    sample: str
    train: list[Record]
    evals: list[Record]
    events: list[Record]


def load_run(run_dir: Path) -> Run:
    """Read a run directory. `ConfigError` if it is not a folder with at least one train or eval line in its
    metrics.jsonl; `RunError` if that file is damaged."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(f"run is {str(run_dir)!r}: must be a folder that holds metrics.jsonl")
    records = list(read_lines(metrics))
    measured = last_attempt(records)
    train = [record for record in measured if record["kind"] == "train"]
    evals = [record for record in measured if record["kind"] == "eval"]
    if not train and not evals:
        raise ConfigError(f"run is {str(run_dir)!r}: must have a train or eval line in metrics.jsonl")
    config_text = _text(run_dir / "config.yaml")
    return Run(
        folder=run_dir,
        name=run_dir.resolve().name,
        config_text=config_text,
        config=_mapping(config_text),
        model=_mapping(_text(run_dir / "model.json")),
        sample=_text(run_dir / "sample.txt"),
        train=train,
        evals=evals,
        events=[record for record in records if record.get("kind") == "event" and _has_step(record)],
    )


def read_lines(path: Path) -> Iterator[Record]:
    """`metrics_lines`, with tables as arrays."""
    return map(_with_tables, metrics_lines(path))


def _with_tables(record: Record) -> Record:
    for key in _TABLES:
        if key in record:
            record[key] = _table(record[key])
    return record


def _table(rows: Any) -> Any:
    """`rows` as an array; None if they are no table, as where layers have different numbers of experts."""
    if not rows or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows) or not rows[0]:
        return None
    return np.array(rows, dtype=np.float32)


def last_attempt(records: Sequence[Record]) -> list[Record]:
    """The train and eval lines, in step order, that belong to the weights the run ended with.

    A run resumed from an earlier checkpoint goes over some steps again: each line makes void those before it in the
    file that are of a later step, and the one of its own step and kind.
    """
    kept: list[Record] = []
    for record in records:
        if record.get("kind") not in ("train", "eval") or not _has_step(record):
            continue
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
        same_step = [i for i in range(max(0, len(kept) - 3), len(kept)) if kept[i]["step"] == record["step"]]
        for i in reversed(same_step):
            if _kind(kept[i]) == _kind(record):
                del kept[i]
        kept.append(record)
    return kept


def _kind(record: Record) -> tuple[str, bool]:
    """A validation on the whole text and one on a part of it may share a step, so they are two kinds."""
    return record["kind"], bool(record.get("whole"))


def _has_step(record: Record) -> bool:
    return isinstance(record.get("step"), (int, float))


def get(config: dict[str, Any], *keys: str) -> Any:
    """A nested value of the config, None if any part of the way is missing."""
    value: Any = config
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that another tool left; empty if it is absent or not one: the report shows what it can."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(text: str) -> dict[str, Any]:
    """YAML (so JSON too) as a dict; empty if it is not one: the report shows what it can."""
    try:
        value = json.loads(text) if text.startswith("{") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}
