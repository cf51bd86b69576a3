"""Where a Megatron checkpoint lies in its folder."""

from __future__ import annotations

from pathlib import Path

from dmoe.config import require
from dmoe.errors import RunError

TRACKER = "latest_checkpointed_iteration.txt"
RANK_FILE = "model_optim_rng.pt"
DIST_METADATA = "metadata.json"
"""Marks a distributed checkpoint."""


def folder_name(iteration: int) -> str:
    """`release` for iteration 0: weights alone, which Megatron loads without optimiser and starts at step 0."""
    return f"iter_{iteration:07d}" if iteration else "release"


def is_dist(folder: Path) -> bool:
    return (folder / DIST_METADATA).is_file() and (folder / ".metadata").is_file()


def is_ranks(folder: Path) -> bool:
    return any(folder.glob("mp_rank_*"))


def holds_checkpoint(path: Path) -> bool:
    return path.is_dir() and ((path / TRACKER).is_file() or is_dist(path) or is_ranks(path))


def iteration_folder(path: Path, iteration: int | None = None) -> Path:
    """The folder with the files: `path` itself, or the one in it that its tracker (or `iteration`) names.

    Raises RunError for a tracker or folder that is not there or not understood.
    """
    if iteration is None and (is_dist(path) or is_ranks(path)):
        return path
    if iteration is None:
        try:
            text = (path / TRACKER).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise RunError(f"{path}: has no {TRACKER}, no mp_rank_* and no {DIST_METADATA}") from error
        if text != "release" and not text.isdigit():
            raise RunError(f"{path / TRACKER}: says {text[:50]!r}: must be a number or release")
        iteration = 0 if text == "release" else int(text)
        name = "release" if text == "release" else f"iter_{iteration:07d}"
    else:
        name = folder_name(iteration)
    folder = path / name
    if not (is_dist(folder) or is_ranks(folder)):
        raise RunError(f"{folder}: holds no Megatron checkpoint (no mp_rank_* and no {DIST_METADATA} with .metadata)")
    return folder


def check_iteration(iteration: int) -> None:
    require(0 <= iteration < 10**7, "iteration", iteration, "0 (release) to 9999999")
