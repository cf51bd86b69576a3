"""torch.distributed.checkpoint (DCP) without arbitrary pickles, and with errors that keep their cause.

DCP's `.metadata` is a pickle and its reader loads it with no restriction, as it does any value that is not a tensor.
Here `.metadata` is loaded by an unpickler that admits DCP's own dataclasses and nothing else, tensors are loaded with
weights_only (DCP does that itself) and values that are not tensors are refused (they live in trainer.json).
Imported only when a checkpoint is read or written, since DCP is slow to import.
"""

from __future__ import annotations

import enum
import io
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from dmoe.checkpoint.manifest import METADATA
from dmoe.errors import RunError

# By name, not by import: two of them are private, and a torch that moved them must still import this module.
_DCP_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "BytesStorageMetadata",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    )
} | {("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size")}


def _layout(name: str) -> torch.layout:
    layout = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(layout, torch.layout):
        raise pickle.UnpicklingError(f"{name} is not a layout")
    return layout


def enum_member(cls: type, name: str) -> enum.Enum:
    """What a pickled getattr may give: a member of an enum. Raises pickle.UnpicklingError."""
    # Some Python versions pickle an enum member as getattr(cls, name); plain getattr would reach far beyond members.
    if not (isinstance(cls, type) and issubclass(cls, enum.Enum)):
        raise pickle.UnpicklingError(f"getattr on {cls!r}")
    return cls[name]


class MetadataUnpickler(pickle.Unpickler):
    """Loads DCP's dataclasses and what they hold. Raises RunError for any other class."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _DCP_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) == ("torch.serialization", "_get_layout"):
            return _layout
        if (module, name) in (("builtins", "getattr"), ("__builtin__", "getattr")):
            return enum_member
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath"):
            return PurePosixPath  # only a note of where it was written; a WindowsPath cannot be made elsewhere
        raise RunError(f"it would load {module}.{name}, which has no place in a checkpoint")


def read_dcp_metadata(folder: Path, unpickler: type[MetadataUnpickler] = MetadataUnpickler) -> Metadata:
    """Read DCP's `.metadata` with an unpickler that admits only DCP's dataclasses. Raises RunError."""
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = unpickler(file).load()
    except RunError as error:
        raise RunError(f"{folder}: {METADATA} is refused: {error}") from None
    except Exception as error:  # damaged pickles raise nearly anything
        message = " ".join(str(error).split())
        raise RunError(f"{folder}: {METADATA} cannot be read: {type(error).__name__}: {message}") from error
    fields = getattr(metadata, "state_dict_metadata", None), getattr(metadata, "storage_data", None)
    if not isinstance(metadata, Metadata) or not all(isinstance(field, dict) for field in fields):
        raise RunError(f"{folder}: {METADATA} is damaged: not the metadata of a DCP checkpoint")
    return metadata


class _Reader(dcp.FileSystemReader):
    """Reads the folder with metadata that was loaded safely before."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata.storage_meta is None:
            self._metadata.storage_meta = StorageMeta()
        return self._metadata


class _Planner(dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        # The base class would unpickle them without restriction.
        raise RunError(f"{read_item.dest_index.fqn} is not a tensor")


class _Writer(dcp.FileSystemWriter):
    def write_data(self, plan: Any, planner: Any) -> Any:
        # torch.save hides a full disk behind "unexpected pos 704 vs 598". Uncover it here: on its way to other ranks
        # an exception loses the chain that leads to its cause.
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause = _os_error(error)
            if cause is None or cause is error:
                raise
            raise cause from None


class _SavePlanner(dcp.DefaultSavePlanner):
    def __init__(self, data: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._data = data

    def lookup_object(self, index: Any) -> Any:
        return self._data[index.fqn] if index.fqn in self._data else super().lookup_object(index)


def write_tensors(folder: Path, tensors: dict[str, Any], data: dict[str, torch.Tensor], group: Any = None) -> None:
    """Write nested tensors to `folder`, all ranks of `group` together. Content is taken from `data` (this rank's part,
    by dotted name) where that has it. Raises OSError, or DCP's own exception, on every rank."""
    with _unwrapped(), _quiet():
        dcp.save(tensors, storage_writer=_Writer(folder), planner=_SavePlanner(data), process_group=group)


def read_tensors(folder: Path, metadata: Metadata, tensors: dict[str, Any]) -> None:
    """Read into the tensors of a nested dict, in place, all ranks together. Raises RunError on every rank."""
    try:
        with _unwrapped(), _quiet():
            dcp.load(tensors, storage_reader=_Reader(folder, metadata), planner=_Planner())
    except Exception as error:
        message = " ".join(str(error).split())
        raise RunError(f"{folder}: tensors cannot be read: {type(error).__name__}: {message[:300]}") from error


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the first rank's own exception in place of DCP's CheckpointException, which is not even an Exception."""
    try:
        yield
    except CheckpointException as wrapped:
        causes = [wrapped.failures[rank][0] for rank in sorted(wrapped.failures)]
        # A full disk is the better explanation when ranks failed for different reasons.
        raise next((c for c in causes if isinstance(c, OSError)), causes[0]) from wrapped


def ignore_single_process_warning() -> None:
    """One process without a process group is an ordinary run here, which DCP warns of."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


@contextmanager
def _quiet() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # catch_warnings changes the filters of all threads
        return
    with warnings.catch_warnings():
        ignore_single_process_warning()
        yield


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return None
