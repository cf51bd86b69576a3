"""Which checkpoints there are, and whether one is whole: `manifest.json` lists every file's size and SHA-256."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from dmoe.errors import RunError

MANIFEST = "manifest.json"
VALUES = "trainer.json"
METADATA = ".metadata"  # DCP's name
FORMAT = "dmoe-checkpoint"
FORMAT_VERSION = 1

Entries = dict[str, dict[str, Any]]  # file name -> {"bytes": size, "sha256": hex digest}

# ".old": the same step's earlier copy, moved aside for the instant in which the new one takes its name.
_FOLDER = re.compile(r"step-(\d{8,})(\.old)?")


def checkpoints_root(run_dir: Path) -> Path:
    """Folder of a run that holds its checkpoints."""
    return Path(run_dir) / "checkpoints"


def folder_name(step: int) -> str:
    """Name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def folder_step(path: Path) -> int | None:
    """Step in a checkpoint folder's name, or None if it is not such a name."""
    match = _FOLDER.fullmatch(path.name)
    return int(match.group(1)) if match else None


def published_folders(run_dir: Path) -> list[Path]:
    """Every folder with a checkpoint's name, newest (highest step) first, with or without a manifest."""
    root = checkpoints_root(run_dir)
    try:
        folders = [p for p in root.iterdir() if folder_step(p) is not None and p.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunError(f"{root} cannot be read: {error.strerror}") from error
    return sorted(folders, key=lambda p: (folder_step(p), p.suffix != ".old"), reverse=True)


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run that have a manifest, newest first; `verify_checkpoint` says if one is whole."""
    return [p for p in published_folders(run_dir) if (p / MANIFEST).is_file()]


def describe(paths: Iterable[Path]) -> Entries:
    """Sizes and checksums of these files, which are also flushed to the disk. Raises OSError."""
    entries: Entries = {}
    for path in paths:
        digest, size = _sha256(path, sync=True)
        entries[path.name] = {"bytes": size, "sha256": digest}
    return entries


def write_manifest(folder: Path, step: int, known: Entries) -> None:
    """List every file of `folder` in its manifest, and flush folder and files to the disk.

    `known` has the entries of files that were described by the ranks that wrote them. Raises OSError, also if one of
    these is not here with its size: ranks have to share the file system.
    """
    for name, entry in known.items():
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            size = None
        if size != entry["bytes"]:
            reason = f"{name}, written by another rank, is not whole here: all ranks must share the file system"
            raise OSError(errno.EIO, reason)
    rest = sorted(p for p in folder.iterdir() if p.is_file() and p.name not in known)
    files = dict(sorted({**known, **describe(rest)}.items()))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "torch": torch.__version__,
        "files": files,
    }
    write_json(folder / MANIFEST, manifest)
    sync_folder(folder)


def write_json(path: Path, content: Any) -> None:
    """Write JSON and flush it to the disk. For a file in a folder that is not published yet."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (names, renames) to the disk, where the system can."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, its form checked. Raises RunError."""
    file = path / MANIFEST
    if not file.is_file():
        raise RunError(f"{path}: {MANIFEST} is missing, so this is not a whole checkpoint")
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f'format is {manifest["format"]!r}, not "{FORMAT}"')
        newer = manifest["format_version"] > FORMAT_VERSION
        if not isinstance(manifest["step"], int):
            raise ValueError("step is not a whole number")
        for name, entry in manifest["files"].items():
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise ValueError(f"{name!r} is not a file name")
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise ValueError(f"the entry of {name!r} is not a size and a SHA-256")
    except OSError as error:
        raise RunError(f"{path}: {MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: {MANIFEST} is damaged: {type(error).__name__}: {_one_line(error)}") from error
    if newer:
        raise RunError(
            f"{path}: format version {manifest['format_version']} is newer than this dmoe's {FORMAT_VERSION}"
        )
    if folder_step(path) not in (None, manifest["step"]):
        raise RunError(f"{path}: {MANIFEST} is of step {manifest['step']}")
    return manifest


def check_sizes(path: Path, manifest: dict[str, Any]) -> None:
    """The quick part of `verify_checkpoint`: every file there, with its size. Raises RunError."""
    for name in (METADATA, VALUES):
        if name not in manifest["files"]:
            raise RunError(f"{path}: {name} is needed but not listed in {MANIFEST}")
    for name, entry in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            raise RunError(f"{path}: {name} is missing") from None
        except OSError as error:
            raise RunError(f"{path}: {name} cannot be read: {error.strerror}") from error
        if size != entry["bytes"]:
            how = "truncated" if size < entry["bytes"] else "too long"
            raise RunError(f"{path}: {name} is {how}: {size} bytes, expected {entry['bytes']}")


def verify_checkpoint(path: Path) -> None:
    """Read a whole checkpoint folder and compare it with its manifest.

    Raises RunError, in one line, that names the file that is missing, of another size (both sizes), altered (SHA-256)
    or needed without being listed, or the class that `.metadata` would load and must not.
    """
    verify_share(Path(path), 0, 1)


def verify_share(path: Path, index: int, count: int) -> None:
    """The part of `verify_checkpoint` that process `index` of `count` does: the contents are spread over them."""
    from dmoe.checkpoint.dcp_io import read_dcp_metadata

    manifest = read_manifest(path)
    check_sizes(path, manifest)
    by_size = sorted(manifest["files"].items(), key=lambda item: -item[1]["bytes"])
    for name, entry in by_size[index::count]:
        try:
            digest, _ = _sha256(path / name)
        except OSError as error:
            raise RunError(f"{path}: {name} cannot be read: {error.strerror}") from error
        if digest != entry["sha256"]:
            raise RunError(f"{path}: {name} is altered: its SHA-256 is not the one in {MANIFEST}")
    if index != 0:
        return
    # Also keeps the reader inside the folder: a listed name has no slash.
    needed = {str(getattr(info, "relative_path", "")) for info in read_dcp_metadata(path).storage_data.values()}
    for name in sorted(needed - manifest["files"].keys()):
        raise RunError(f"{path}: {name!r} is needed but not listed in {MANIFEST}")


def looks_whole(path: Path) -> bool:
    """Whether the manifest reads and all sizes agree; contents are not read."""
    try:
        check_sizes(path, read_manifest(path))
    except RunError:
        return False
    return True


def read_values(path: Path) -> dict[str, Any]:
    """Content of trainer.json: the values of every section that are not tensors. Raises RunError."""
    try:
        values = json.loads((path / VALUES).read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: {VALUES} cannot be read: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise RunError(f"{path}: {VALUES} is damaged: not a JSON object")
    return values


def _sha256(path: Path, *, sync: bool = False) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest(), size


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
