"""The `.metadata` of a distributed checkpoint by Megatron-core: DCP's own, and the plans of the ranks beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from dmoe.checkpoint import dcp_io
from dmoe.checkpoint.formats.megatron.torch_files import Opaque
from dmoe.checkpoint.manifest import METADATA
from dmoe.errors import RunError


class _Unpickler(dcp_io._MetadataUnpickler):
    """Loads what a checkpoint of ours may hold; anything else becomes an `Opaque` object and is not looked at."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "getattr":
            return _member
        try:
            return super().find_class(module, name)
        except RunError:
            return Opaque


def _member(cls: Any, name: str) -> Any:
    return Opaque() if cls is Opaque else dcp_io._enum_member(cls, name)


def read_metadata(folder: Path) -> Metadata:
    """Read `.metadata`; classes beyond DCP's own are not loaded. Raises RunError."""
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
    except Exception as error:  # damaged pickles raise nearly anything
        message = " ".join(str(error).split())
        raise RunError(f"{folder}: {METADATA} cannot be read: {type(error).__name__}: {message}") from error
    fields = getattr(metadata, "state_dict_metadata", None), getattr(metadata, "storage_data", None)
    if not isinstance(metadata, Metadata) or not all(isinstance(field, dict) for field in fields):
        raise RunError(f"{folder}: {METADATA} is damaged: not the metadata of a DCP checkpoint")
    return metadata
