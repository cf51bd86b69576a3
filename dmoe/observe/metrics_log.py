"""metrics.jsonl: one JSON object a line, written so that a killed run leaves at most one broken line, the last."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from dmoe.errors import RunError


class MetricsWriter:
    """Appends lines to a metrics file; a context manager.

    Opening an existing file cuts off a last line that is broken, because the process before was killed while it wrote.
    Parent folders are made. `RunError` when the file cannot be opened or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _repair_tail(self.path)
            # Unbuffered: every `write` below is one system call, so lines reach the file whole and at once.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise RunError(f"cannot open {self.path}: {error.strerror}") from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` as one line. Numbers that are not finite become null; arrays and tensors become lists."""
        line = json.dumps(_to_json(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            written = self._file.write(line)
        except OSError as error:
            raise RunError(f"cannot write {self.path}: {error.strerror}") from error
        if written != len(line):
            raise RunError(f"cannot write {self.path}: {written} of {len(line)} bytes were written (disk full?)")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metrics_lines(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file in file order, as dicts, one after another: never more than one is held as text.
    null, and NaN or Infinity if written by hand, become None.

    A broken last line is left out. A broken line before it is damage, not an interruption: `RunError` with its number.
    """
    broken = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                if broken:
                    raise RunError(f"{path}: line {broken} is not a JSON object")
                record = _parse(line)
                if record is None:
                    broken = number
                else:
                    yield record
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All of `metrics_lines`."""
    return list(metrics_lines(path))


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object that `line` holds; None if it is not one."""
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except ValueError:  # includes bytes that are not UTF-8
        return None
    return record if isinstance(record, dict) else None


def _repair_tail(path: Path) -> None:
    """Cut a broken last line off `path`, or end a whole one that lacks its newline."""
    if not path.exists():
        return
    content = path.read_bytes()
    body = content.rstrip(b"\n")
    start = body.rfind(b"\n") + 1
    if not body:
        os.truncate(path, 0)
    elif _parse(body[start:]) is None:
        os.truncate(path, start)
    elif not content.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")


def _to_json(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value
