"""Write a checkpoint beside the others and publish it by a rename, so a crash at any moment leaves the older ones."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from dmoe.checkpoint import manifest, ranks
from dmoe.checkpoint.staging import Snapshot, live_snapshot
from dmoe.config import require
from dmoe.errors import RunError

LATEST = "latest"
_TEMP = re.compile(r"\.tmp-.*?(?:-(\d+))?")


def save_checkpoint(run_dir: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `run_dir/checkpoints/step-<step, 8 digits>` and return its path.

    `state` is nested dicts and lists of tensors (any dtype, device; DTensors are written by shard) and JSON values,
    with one section a key: "model", "optimizer", "rng", "trainer", ... Older checkpoints beyond the `keep` newest
    whole ones are deleted; a checkpoint of the same step is replaced. Collective over all ranks, and blocking: when
    it returns the data is on the disk.

    Raises ConfigError for a bad `keep` or `step`, and RunError, on every rank, if the disk refuses (full, over quota,
    no permission); the temporary folder is then gone and the earlier checkpoints are untouched.
    """
    check_request(step, keep)
    snapshot = ranks.on_each(lambda: live_snapshot(state))
    return write_checkpoint(run_dir, step, snapshot, keep=keep)


def check_request(step: int, keep: int) -> None:
    """Raise ConfigError for a bad `step` or `keep`."""
    require(keep >= 1, "checkpoint.keep", keep, "at least 1")
    require(step >= 0, "step", step, "0 or greater")


def write_checkpoint(run_dir: Path, step: int, snapshot: Snapshot, *, keep: int, group: ranks.Group = None) -> Path:
    """The second half of `save_checkpoint`; its collectives use `group`."""
    root = manifest.checkpoints_root(run_dir)
    target = root / manifest.folder_name(step)
    try:
        _write(root, target, step, snapshot, group)
    except OSError as error:
        intact = ranks.on_main(lambda: _intact(run_dir), group)
        raise RunError(f"cannot write checkpoint {target}: {_reason(error)}; {intact}") from error
    try:
        ranks.on_main(lambda: _tidy(root, target, keep), group)
    except OSError as error:
        raise RunError(f"checkpoint {target} is whole, but tidying {root} failed: {_reason(error)}") from error
    return target


def _write(root: Path, target: Path, step: int, snapshot: Snapshot, group: ranks.Group) -> None:
    from dmoe.checkpoint.dcp_io import write_tensors

    temp = ranks.on_main(lambda: _make_temp(root, target.name), group)
    try:
        write_tensors(temp, snapshot.tensors, snapshot.data, group)
        # Each rank hashes what it wrote: the pages are in its memory, and one process would take world times as long.
        own = ranks.on_each(lambda: manifest.describe(temp.glob(f"__{ranks.rank()}_*")), group)
        known = {name: entry for entries in ranks.gather(own, group) for name, entry in entries.items()}
        ranks.on_main(lambda: _publish(temp, target, step, snapshot.values, known), group)
    except BaseException:  # Ctrl-C too
        if ranks.rank() == 0:
            shutil.rmtree(temp, ignore_errors=True)
        raise


def _make_temp(root: Path, name: str) -> Path:
    if not root.is_dir():
        root.mkdir(parents=True)
        manifest.sync_folder(root.parent)
    _remove_leftovers(root)  # before writing: a killed run may have left the disk nearly full
    temp = _temp_name(root, name)
    temp.mkdir()
    return temp


def _publish(temp: Path, target: Path, step: int, values: dict[str, Any], known: manifest.Entries) -> None:
    manifest.write_json(temp / manifest.VALUES, values)
    manifest.write_manifest(temp, step, known)
    if target.exists():
        # A folder cannot be renamed onto one that has files. The earlier copy keeps a name under which it is found.
        old = target.with_name(target.name + ".old")
        if old.exists():
            _delete(old)
        os.rename(target, old)
    os.rename(temp, target)
    manifest.sync_folder(target.parent)


def _tidy(root: Path, target: Path, keep: int) -> None:
    latest = _temp_name(root, LATEST)
    with latest.open("w", encoding="utf-8") as file:
        file.write(target.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(latest, root / LATEST)
    manifest.sync_folder(root)
    _prune(root, target, keep)


def _prune(root: Path, target: Path, keep: int) -> None:
    """Delete what is older than the `keep` newest whole checkpoints. A damaged one does not count, so it cannot push
    a whole one out; `target`, written just now, always stays."""
    kept = 0
    for path in manifest.published_folders(root.parent):
        superseded = path.suffix == ".old" and path.with_suffix("").exists()
        if path == target:
            kept += 1
        elif superseded or kept >= keep:
            _delete(path)
        elif manifest.looks_whole(path):
            kept += 1


def _delete(path: Path) -> None:
    # Renamed first: a half-deleted folder must not carry a checkpoint's name.
    doomed = _temp_name(path.parent, f"pruned-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what stays is removed before the next save


def _temp_name(root: Path, name: str) -> Path:
    return root / f".tmp-{name}-{os.getpid()}"


def _remove_leftovers(root: Path) -> None:
    """Remove temporary files and folders whose writer is dead."""
    for path in root.iterdir():
        match = _TEMP.fullmatch(path.name)
        if match is None or _is_running(match.group(1)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_running(pid: str | None) -> bool:
    """Whether another process `pid` runs on this machine. Our own leftovers are dead: saves do not overlap."""
    if pid is None or int(pid) == os.getpid():
        return False
    if os.name == "nt":  # there, os.kill ends the process
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _intact(run_dir: Path) -> str:
    try:
        folders = manifest.find_checkpoints(run_dir)
    except RunError:
        return "no earlier checkpoint was touched"
    whole = next((p for p in folders if manifest.looks_whole(p)), None)
    return f"the previous checkpoint {whole.name} is intact" if whole else "there is no earlier checkpoint"


def _reason(error: OSError) -> str:
    return error.strerror or " ".join(str(error).split()) or type(error).__name__
