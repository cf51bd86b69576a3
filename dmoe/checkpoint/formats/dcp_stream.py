"""A checkpoint's model section read a row at a time from whatever boxes the ranks wrote, and written without ever being
in memory. Imported only when a run is converted, since DCP is slow to import."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from dmoe.checkpoint import dcp_io
from dmoe.checkpoint.formats.safetensors_write import Outline
from dmoe.checkpoint.formats.saved_tensor import read_saved
from dmoe.errors import RunError

_FILE = "__0_0.distcp"


class BoxReader:
    """Tensors of a checkpoint folder, in the form in which they are stored. The folder has been verified."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        metadata = dcp_io.read_dcp_metadata(folder)
        self._tensors = {n: m for n, m in metadata.state_dict_metadata.items() if isinstance(m, TensorStorageMetadata)}
        self._boxes = {(i.fqn, tuple(i.offset or ())): info for i, info in metadata.storage_data.items()}

    def outlines(self) -> dict[str, Outline]:
        return {n: Outline(tuple(m.size), m.properties.dtype) for n, m in self._tensors.items()}

    def read(self, name: str, index: int | None = None) -> Tensor:
        """A tensor, or row `index` of its dim 0, put together from the boxes that hold parts of it."""
        size, dtype = tuple(self._tensors[name].size), self._tensors[name].properties.dtype
        first, last = (0, size[0] if size else 1) if index is None else (index, index + 1)
        whole = torch.empty(size if index is None else (1, *size[1:]), dtype=dtype)
        filled = 0
        for chunk in self._tensors[name].chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            if not size:
                whole.copy_(self._box(name, offsets, sizes, None))
                filled += 1
                continue
            begin, end = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
            if begin >= end or math.prod(sizes) == 0:
                continue
            rows = (begin - offsets[0], end - offsets[0])
            region = whole[begin - first : end - first]
            for dim in range(1, len(size)):
                region = region.narrow(dim, offsets[dim], sizes[dim])
            region.copy_(self._box(name, offsets, sizes, rows))
            filled += region.numel()
        if filled != whole.numel():
            raise RunError(f"{self._folder}: {name}: {filled} of {whole.numel()} elements are in its boxes")
        return whole if index is None else whole[0]

    def _box(self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], rows: tuple[int, int] | None) -> Tensor:
        info = self._boxes.get((name, offsets))
        if info is None:
            raise RunError(f"{self._folder}: {name}: the box at {list(offsets)} is in no file")
        if getattr(info, "transform_descriptors", None):
            raise RunError(f"{self._folder}: {name} is compressed, which this dmoe does not read")
        return read_saved(self._folder / info.relative_path, info.offset, info.length, sizes, rows, name)


def write_boxes(
    folder: Path, outlines: dict[str, Outline], by_row: Callable[[str], bool], read: Callable[..., Tensor]
) -> None:
    """Write tensors as DCP does on one rank, one box at a time. DCP itself keeps a box of each tensor until it is done.

    Args:
        by_row: whether a tensor is written in a box for each row of dim 0.
        read: `read(name, index)`: the content of a box; index None: of the whole tensor.
    """
    tensors: dict[str, STORAGE_TYPES] = {}
    results: list[WriteResult] = []
    writer = dcp.FileSystemWriter(folder)
    with (folder / _FILE).open("wb") as file:
        for name, (shape, dtype) in outlines.items():
            boxes = _boxes(shape, by_row(name))
            properties = TensorProperties.create_from_tensor(torch.empty(0, dtype=dtype))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(shape), boxes)
            for i, box in enumerate(boxes):
                tensor = read(name, i if by_row(name) else None).to(dtype).reshape(box.sizes).contiguous()
                start = file.tell()
                _save(tensor, file)
                info = _StorageInfo(_FILE, start, file.tell() - start)
                results.append(WriteResult(MetadataIndex(name, box.offsets, i), info.length, info))
    # How a nested dict was flattened: "model.x" was {"model": {"x": ...}}.
    planner_data = {name: tuple(name.split(".", 1)) for name in outlines}
    writer.finish(Metadata(tensors, planner_data=planner_data), [results])


def _boxes(shape: tuple[int, ...], by_row: bool) -> list[ChunkStorageMetadata]:
    origin, size = [0] * len(shape), torch.Size(shape)
    if not by_row:
        return [ChunkStorageMetadata(torch.Size(origin), size)]
    row = torch.Size([1, *shape[1:]])
    return [ChunkStorageMetadata(torch.Size([i, *origin[1:]]), row) for i in range(shape[0])]


def _save(tensor: Tensor, file: BinaryIO) -> None:
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # a row would be written with all the others
    try:
        torch.save(tensor, file)
    except Exception as error:
        cause = dcp_io._os_error(error)  # torch.save hides a full disk
        raise error if cause is None else cause from None
