"""Routing summaries as .npz files of plain arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dmoe.errors import ConfigError, RunError
from dmoe.observe.routing.summary import RoutingSummary

_SCALARS = {"num_tokens": int, "top_k": int, "step": int, "text_hash": str, "name": str}


def save(path: str | Path, summary: RoutingSummary) -> None:
    """Write `summary` to `path` under a temporary name, then rename; makes the folder. No pickle in it.

    Raises:
        RunError: the disk refuses.
    """
    path = Path(path)
    arrays = {field.name: np.asarray(getattr(summary, field.name)) for field in dataclasses.fields(summary)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # which would hide what went wrong
            temporary.unlink(missing_ok=True)


def load(path: str | Path) -> RoutingSummary:
    """Read what `save` wrote.

    Raises:
        ConfigError: no such file.
        RunError: it is damaged, or no routing summary.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"routing summary is {str(path)!r}: must be an existing .npz file")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            values: dict[str, Any] = {field.name: arrays[field.name] for field in dataclasses.fields(RoutingSummary)}
        values |= {name: kind(values[name][()]) for name, kind in _SCALARS.items()}
    except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"{path}: is damaged or no routing summary: {reason}") from None
    return RoutingSummary(**values)
