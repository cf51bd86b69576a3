"""Writing safetensors files as tensors come: sizes are known before, so a file's header is written first and each
tensor goes to its place. The bytes of a file are those that the format's own library writes for the same tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from dmoe.checkpoint.formats.safetensors_read import DTYPES, INDEX, SINGLE, tensor_bytes

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: i for i, dtype in enumerate(DTYPES.values())}

DEFAULT_SHARD_SIZE = 5_000_000_000
"""Bytes, most of a file; a larger tensor has one of its own."""


class Outline(NamedTuple):
    """A tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsSink:
    """Takes the tensors of `outlines`, in any order, whole or by rows. Implements `TensorSink`.

    Files appear in `folder` at once and are whole after `close`: give it a folder that is published afterwards.

    Args:
        folder: exists.
        outlines: every tensor, in the order in which they fill the files.
        num_params: what the index gives as "total_parameters".
        shard_size: bytes, most of a file.
        single: name of the file where one is enough.
    """

    def __init__(
        self, folder: Path, outlines: Mapping[str, Outline], *, num_params: int | None = None,
        shard_size: int = DEFAULT_SHARD_SIZE, single: str = SINGLE,
    ) -> None:  # fmt: skip
        self._outlines = outlines
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._left = {name: outline.nbytes for name, outline in outlines.items()}
        self._files: list[BinaryIO] = []
        shards = _split(outlines, shard_size)
        stem = single.removesuffix(".safetensors")
        files: dict[str, str] = {}
        for i, names in enumerate(shards):
            file = single if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            self._start(folder / file, {name: outlines[name] for name in names})
            files.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            total = sum(outline.nbytes for outline in outlines.values())
            params = sum(math.prod(o.shape) for o in outlines.values()) if num_params is None else num_params
            index = {"metadata": {"total_parameters": params, "total_size": total}, "weight_map": files}
            content = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / (INDEX if single == SINGLE else f"{single}.index.json")).write_text(content, encoding="utf-8")

    def _start(self, path: Path, outlines: dict[str, Outline]) -> None:
        # The library's order: widest dtypes first, so that each is aligned without gaps, then by name.
        names = sorted(outlines, key=lambda name: (-_ORDER[outlines[name].dtype], name.encode()))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            shape, dtype = outlines[name]
            end = at + outlines[name].nbytes
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        content += b" " * (-len(content) % 8)
        file = path.open("wb", buffering=0)
        self._files.append(file)
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + at)
        at = 8 + len(content)
        for name in names:
            self._places[name] = file, at
            at += outlines[name].nbytes

    def write(self, name: str, tensor: Tensor) -> None:
        self._write(name, tensor, self._outlines[name].shape, 0)

    def write_row(self, name: str, index: int, tensor: Tensor) -> None:
        """Write row `index` of dim 0."""
        shape, dtype = self._outlines[name]
        if not 0 <= index < shape[0]:
            raise IndexError(f"row {index} of {name}, which has {shape[0]}")
        self._write(name, tensor, shape[1:], index * math.prod(shape[1:]) * dtype.itemsize)

    def _write(self, name: str, tensor: Tensor, shape: tuple[int, ...], offset: int) -> None:
        dtype = self._outlines[name].dtype
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}: must be {list(shape)} {dtype}")
        file, start = self._places[name]
        self._left[name] -= tensor.nbytes
        if tensor.numel() == 0:
            return
        buffer = tensor_bytes(tensor.contiguous())
        file.seek(start + offset)
        while buffer.nbytes:
            buffer = buffer[file.write(buffer) :]  # at most 2 GiB a call on Linux

    def abandon(self) -> None:
        """Close the files without a check, after a failure."""
        for file in self._files:
            file.close()

    def close(self) -> None:
        self.abandon()
        incomplete = [name for name, left in self._left.items() if left]
        if incomplete:
            raise ValueError(f"{len(incomplete)} tensors were not written once and whole, such as {incomplete[0]}")


def _split(outlines: Mapping[str, Outline], shard_size: int) -> list[list[str]]:
    """Names by file, as transformers splits them: a file is filled in order until the next tensor would make it larger
    than `shard_size`, and a tensor that is larger itself has its own."""
    shards: list[list[str]] = []
    current: list[str] = []
    size = 0
    for name, outline in outlines.items():
        if outline.nbytes > shard_size:
            shards.append([name])
            continue
        if size + outline.nbytes > shard_size:
            shards.append(current)
            current, size = [], 0
        current.append(name)
        size += outline.nbytes
    return [*shards, current] if current or not shards else shards
