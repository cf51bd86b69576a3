"""Reading safetensors files strictly, a tensor or a row at a time.

Format: 8 bytes, little endian: length of the header; the header, a JSON object that gives each tensor's dtype, shape
and place in what follows; the bytes of the tensors, without gaps. (https://github.com/huggingface/safetensors, README)

Bytes are read into new memory rather than mapped: mapped pages count as this process's memory once touched, and a
conversion touches all of them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from dmoe.errors import RunError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # bytes; a bound of the format's own reader

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I16": torch.int16, "U16": torch.uint16,
    "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
"""By the format's names, in the order in which its own writer sorts them, least first."""


class Entry(NamedTuple):
    """A tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its bytes from the beginning of the file."""


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a file. Raises RunError, naming file and tensor, for a header that is not whole and consistent:
    dtypes, sizes, and bytes that belong to no tensor, to two, or to none of the file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            content = file.read(8)
            if len(content) < 8:
                raise RunError(f"{path}: is truncated: {size} bytes, and the length of the header takes 8")
            (length,) = struct.unpack("<Q", content)
            if length > _MAX_HEADER:
                raise RunError(f"{path}: is no safetensors file: its header would be {length} bytes long")
            if length + 8 > size:
                raise RunError(f"{path}: is truncated: {size} bytes, and its header alone takes {length + 8}")
            header = _parse(path, file.read(length))
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    entries = {name: _entry(path, name, value) for name, value in header.items() if name != "__metadata__"}
    _check_places(path, entries, size - 8 - length)
    return {name: Entry(dtype, shape, begin + 8 + length) for name, (dtype, shape, begin, _) in entries.items()}


def _parse(path: Path, content: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a name appears twice")
        return found

    try:
        header = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: its header is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(header, dict):
        raise RunError(f"{path}: its header is damaged: not a JSON object")
    return header


def _entry(path: Path, name: str, value: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    def whole_numbers(numbers: Any) -> bool:
        return isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)

    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise RunError(f"{path}: {name}: its entry is damaged: must have dtype, shape and data_offsets")
    if value["dtype"] not in DTYPES:
        raise RunError(f"{path}: {name} has dtype {value['dtype']!r}: must be one of {', '.join(DTYPES)}")
    if not whole_numbers(value["shape"]):
        raise RunError(f"{path}: {name} has shape {value['shape']!r}: must be a list of whole numbers")
    if not whole_numbers(value["data_offsets"]) or len(value["data_offsets"]) != 2:
        raise RunError(f"{path}: {name} has data_offsets {value['data_offsets']!r}: must be two whole numbers")
    begin, end = value["data_offsets"]
    dtype, shape = DTYPES[value["dtype"]], tuple(value["shape"])
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise RunError(f"{path}: {name} has {end - begin} bytes: must be {needed} for {list(shape)} of {dtype}")
    return dtype, shape, begin, end


def _check_places(path: Path, entries: dict[str, tuple[torch.dtype, tuple[int, ...], int, int]], size: int) -> None:
    at, before = 0, "the header"
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin < at:
            raise RunError(f"{path}: {name} overlaps {before}")
        if begin > at:
            raise RunError(f"{path}: {begin - at} bytes between {before} and {name} belong to no tensor")
        if end > size:
            raise RunError(f"{path}: is truncated: {name} ends at byte {end} of the data, which has {size}")
        at, before = end, name
    if at < size:
        raise RunError(f"{path}: {size - at} bytes after {before} belong to no tensor")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor that is not empty."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_bytes_into(file: BinaryIO, start: int, tensor: Tensor) -> bool:
    """Fill a new contiguous CPU tensor from `start` of an unbuffered file. False: the file ended before."""
    if tensor.numel() == 0:
        return True
    buffer = tensor_bytes(tensor)
    file.seek(start)
    while buffer.nbytes:
        count = file.readinto(buffer)  # type: ignore[attr-defined]  # at most 2 GiB a call on Linux
        if not count:
            return False
        buffer = buffer[count:]
    return True


class SafetensorsStore:
    """The tensors of a folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.

    Implements `TensorStore`. Raises RunError, here or in `read`, for files that are missing, damaged, or of which the
    index tells something else.
    """

    def __init__(self, folder: Path) -> None:
        index = folder / INDEX
        wanted = _read_index(index) if index.is_file() else None
        files = [folder / SINGLE] if wanted is None else [folder / name for name in sorted(set(wanted.values()))]
        self._entries: dict[str, tuple[Path, Entry]] = {}
        for file in files:
            if not file.is_file():
                named = f", which {INDEX} names for {_first(wanted, file.name)}" if wanted else ""
                raise RunError(f"{file} is missing{named}")
            for name, entry in read_header(file).items():
                if name in self._entries:
                    raise RunError(f"{name} is in two files: {self._entries[name][0]} and {file}")
                self._entries[name] = file, entry
        if wanted is not None:
            self._compare(index, wanted)

    def _compare(self, index: Path, wanted: dict[str, str]) -> None:
        for name, file in wanted.items():
            if name not in self._entries or self._entries[name][0].name != file:
                raise RunError(f"{index}: {name} is not in {file}, which the index names for it")
        for name, (path, _) in self._entries.items():
            if name not in wanted:
                raise RunError(f"{path}: {name} is not in {INDEX}")

    def names(self) -> Iterable[str]:
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._entries[name][1].dtype

    def where(self, name: str) -> str:
        return str(self._entries[name][0])

    def read(self, name: str, index: int | None = None) -> Tensor:
        path, (dtype, shape, start) = self._entries[name]
        if index is not None:
            if not 0 <= index < shape[0]:
                raise IndexError(f"row {index} of {name}, which has {shape[0]}")
            shape = shape[1:]
            start += index * math.prod(shape) * dtype.itemsize
        tensor = torch.empty(shape, dtype=dtype)
        try:
            with path.open("rb", buffering=0) as file:
                whole = read_bytes_into(file, start, tensor)
        except OSError as error:
            raise RunError(f"{path}: {name} cannot be read: {error.strerror}") from error
        if not whole:
            raise RunError(f"{path}: is truncated within {name}")
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    try:
        index = json.loads(path.read_bytes())
        files = index["weight_map"]
        if not all(isinstance(file, str) and file == Path(file).name for file in files.values()):
            raise ValueError("weight_map must give the names of files in the same folder")
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: is damaged: {type(error).__name__}: {' '.join(str(error).split())}") from None
    return files


def _first(wanted: dict[str, str], file: str) -> str:
    names = [name for name, where in wanted.items() if where == file]
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
