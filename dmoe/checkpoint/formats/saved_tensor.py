"""A tensor that `torch.save` wrote into a part of a file, of which rows can be read alone.

A box of a checkpoint can hold all experts of a layer: gigabytes, where a conversion wants one of them. `torch.save`
writes a zip archive without compression, in which the numbers lie in one piece.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from dmoe.checkpoint.formats.safetensors_read import read_bytes_into
from dmoe.errors import RunError

_LOCAL_HEADER = 30  # bytes of a zip entry's header before its name and extra field
# How `torch.save` names dtypes. Others, the newer ones, are read by torch.load.
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str


class _Layout(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _layout(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> _Layout:
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Layout(storage, offset, tuple(shape), tuple(stride))


class _LayoutUnpickler(pickle.Unpickler):
    """Reads how a tensor lies in its storage, and makes nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _layout
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise pickle.UnpicklingError("not a storage")
        return _Storage(dtype, key)


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._start + self._at)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def read_saved(
    path: Path, start: int, length: int, shape: tuple[int, ...], rows: tuple[int, int] | None, what: str
) -> Tensor:
    """Rows [first, last) of dim 0, or all, of the tensor of `shape` at these bytes of a file. Raises RunError.

    Where it does not lie in order in its storage the whole of it is read, by `torch.load(weights_only=True)`.
    """
    try:
        with path.open("rb", buffering=0) as file:
            tensor = None if rows is None else _read_rows(file, start, length, shape, rows)
            if tensor is not None:
                return tensor
            file.seek(start)
            content = io.BytesIO(file.read(length))
        tensor = torch.load(content, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RunError(f"{path}: {what} cannot be read: {error.strerror}") from error
    except Exception as error:  # damaged archives and pickles raise nearly anything
        message = " ".join(str(error).split())[:300]
        raise RunError(f"{path}: {what} cannot be read: {type(error).__name__}: {message}") from error
    if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape:
        raise RunError(f"{path}: {what} is not a tensor {list(shape)}")
    return tensor if rows is None else tensor[rows[0] : rows[1]]


def _read_rows(file: BinaryIO, start: int, length: int, shape: tuple[int, ...], rows: tuple[int, int]) -> Tensor | None:
    with zipfile.ZipFile(io.BufferedReader(_Slice(file, start, length))) as archive:
        entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        try:
            layout = _LayoutUnpickler(io.BytesIO(archive.read(entries["data.pkl"]))).load()
        except pickle.UnpicklingError:
            return None  # torch.load decides what it is
        if not isinstance(layout, _Layout) or layout.shape != shape or not _in_order(layout):
            return None
        data = entries[f"data/{layout.storage.key}"]
    dtype, row = layout.storage.dtype, math.prod(shape[1:])
    if data.compress_type != zipfile.ZIP_STORED or data.file_size < (layout.offset + shape[0] * row) * dtype.itemsize:
        return None
    file.seek(start + data.header_offset)
    header = file.read(_LOCAL_HEADER)
    name, extra = struct.unpack("<HH", header[26:30])
    first = start + data.header_offset + _LOCAL_HEADER + name + extra
    tensor = torch.empty((rows[1] - rows[0], *shape[1:]), dtype=dtype)
    whole = read_bytes_into(file, first + (layout.offset + rows[0] * row) * dtype.itemsize, tensor)
    return tensor if whole else None


def _in_order(layout: _Layout) -> bool:
    stride = 1
    for size, step in zip(reversed(layout.shape), reversed(layout.stride)):
        if size > 1 and step != stride:
            return False
        stride *= size
    return True
