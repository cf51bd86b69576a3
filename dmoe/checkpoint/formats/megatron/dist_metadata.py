"""The `.metadata` of a distributed checkpoint by Megatron-core: DCP's own, and the plans of the ranks beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from dmoe.checkpoint import dcp_io
from dmoe.checkpoint.formats.megatron.torch_files import Opaque
from dmoe.errors import RunError


class _Unpickler(dcp_io.MetadataUnpickler):
    """Loads what a checkpoint of ours may hold; anything else becomes an `Opaque` object and is not looked at."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "getattr":
            return _member
        try:
            return super().find_class(module, name)
        except RunError:
            return Opaque


def _member(cls: Any, name: str) -> Any:
    return Opaque() if cls is Opaque else dcp_io.enum_member(cls, name)


def read_metadata(folder: Path) -> Metadata:
    """Read `.metadata`; classes beyond DCP's own are not loaded. Raises RunError."""
    return dcp_io.read_dcp_metadata(folder, _Unpickler)
