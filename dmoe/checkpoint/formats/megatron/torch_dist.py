"""Reading Megatron-core's distributed checkpoints (`torch_dist`): tensors of the whole model in PyTorch's format (DCP).

Layers that are alike are rows of one tensor, `decoder.layers.<rest>` [L, ...]; else each has keys of its own,
`decoder.layers.N.<rest>`. Experts are the axis after, under `mlp.experts.experts.`, or each under its number, gate and
up apart (`weight_w`, `weight_v`). What is not a tensor is in `common.pt`, or in newer versions in the object
`common_state`.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dmoe.checkpoint.formats.megatron import torch_files
from dmoe.checkpoint.formats.megatron.folders import DIST_METADATA
from dmoe.checkpoint.formats.saved_tensor import read_saved
from dmoe.config import ModelConfig
from dmoe.errors import RunError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

COMMON = "common.pt"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"(mlp\.experts\.)local_experts\.(\d+)\.(.+)")
_OPTIMIZER = re.compile(r"(optimizer|chained_\d+)\.")
FUSED_INPUT_NORM = "self_attention.linear_qkv.layer_norm_weight"
FUSED_MLP_NORM = "mlp.linear_fc1.layer_norm_weight"
MLP_NORM = "pre_mlp_layernorm.weight"


class Place(NamedTuple):
    """Where a tensor lies: in one of DCP's, at these numbers on its first axes."""

    key: str
    at: tuple[int, ...]


def axes(place: Place, config: ModelConfig) -> tuple[int, ...]:
    """Sizes of the axes that `place.at` counts: layers, experts."""
    stacked = bool(place.at) and re.match(r"decoder\.layers\.\d", place.key) is None
    return (config.num_layers,) * stacked + (config.moe.num_experts,) * (len(place.at) - stacked)


def places(name: str) -> list[list[Place]]:
    """Where the tensor of a rank that holds the whole model (local names, an expert a module) may lie, best first; each
    a list of those that are put together along dim 0."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return [[Place(name, ())]]
    layer, rest = int(match[1]), match[2]
    result = []
    for tails in _tails(rest):
        result.append([Place(f"decoder.layers.{tail}", (layer, *index)) for tail, index in tails])
        result.append([Place(f"decoder.layers.{layer}.{tail}", index) for tail, index in tails])
    return result


def _tails(rest: str) -> list[list[tuple[str, tuple[int, ...]]]]:
    if rest == "input_layernorm.weight":
        return [[(FUSED_INPUT_NORM, ())], [(rest, ())]]
    if rest == MLP_NORM:
        return [[(MLP_NORM, ())], [(FUSED_MLP_NORM, ())]]
    match = _EXPERT.fullmatch(rest)
    if match is None:
        return [[(rest, ())]]
    prefix, expert, leaf = f"{match[1]}experts.", int(match[2]), match[3]
    halves = ("_w", "_v") if "linear_fc1" in leaf else ("",)
    return [[(prefix + leaf, (expert,))], [(f"{prefix}{expert}.{leaf}{half}", ()) for half in halves]]


class DistStore:
    """The tensors of a `torch_dist` folder under the names of one rank that holds the whole model.

    Reads the chunks that hold what is asked for; the last few are kept, as a chunk may hold several experts.
    """

    def __init__(self, folder: Path, metadata: Metadata, wanted: Iterable[str], config: ModelConfig) -> None:
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._folder, self._metadata, self._config = folder, metadata, config
        self._tensors = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and _OPTIMIZER.match(key) is None
        }
        self._places: dict[str, list[Place]] = {}
        for name in wanted:
            found = next((p for p in places(name) if all(place.key in self._tensors for place in p)), None)
            if found is not None:
                self._places[name] = found
        used = {place.key for found in self._places.values() for place in found}
        self._unused = self._tensors.keys() - used
        self._chunks: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def names(self) -> Iterable[str]:
        return [*self._places, *self._unused]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor, or of all of DCP's if it has another number of layers or experts, which is an error then."""
        shapes = []
        for place in self._places[name]:
            size = tuple(self._tensors[place.key].size)
            if size[: len(place.at)] != axes(place, self._config):
                return size
            shapes.append(size[len(place.at) :])
        return (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[self._places[name][0].key].properties.dtype

    def where(self, name: str) -> str:
        return str(self._folder)

    def read(self, name: str, index: int | None = None) -> Tensor:
        boxes = [self._box(place) for place in self._places[name]]
        tensor = torch.cat(boxes) if len(boxes) > 1 else boxes[0]
        return tensor if index is None else tensor[index]

    def _box(self, place: Place) -> Tensor:
        entry = self._tensors[place.key]
        start = [*place.at, *[0] * (len(entry.size) - len(place.at))]
        stop = [*(i + 1 for i in place.at), *entry.size[len(place.at) :]]
        result = torch.empty([b - a for a, b in zip(start, stop)], dtype=entry.properties.dtype)
        left = result.numel()
        for chunk in entry.chunks:
            lo = [max(a, o) for a, o in zip(start, chunk.offsets)]
            hi = [min(b, o + s) for b, o, s in zip(stop, chunk.offsets, chunk.sizes)]
            if any(a >= b for a, b in zip(lo, hi)):
                continue
            target = result[tuple(slice(a - s, b - s) for a, b, s in zip(lo, hi, start))]
            content = self._chunk(place.key, chunk)
            target.copy_(content[tuple(slice(a - o, b - o) for a, b, o in zip(lo, hi, chunk.offsets))])
            left -= target.numel()
        if left:
            raise RunError(f"{self._folder}: {left} elements of {place.key} are in no file, or in two")
        return result.reshape(result.shape[len(place.at) :])

    def _chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        at = (key, tuple(chunk.offsets))
        if at not in self._chunks:
            while len(self._chunks) > 1:  # gate and up are in different ones
                self._chunks.pop(next(iter(self._chunks)))
            file, start, length = locate(self._folder, self._metadata, key, chunk.offsets)
            self._chunks[at] = read_saved(file, start, length, tuple(chunk.sizes), None, key)
        return self._chunks[at]


def locate(folder: Path, metadata: Metadata, key: str, offsets: Sequence[int] | None) -> tuple[Path, int, int]:
    """File, first byte and length of an item. Raises RunError for one that is in no file of `folder`."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    index = MetadataIndex(key, None if offsets is None else torch.Size(offsets))
    info = (metadata.storage_data or {}).get(index)
    if info is None:
        raise RunError(f"{folder}: {key} at {list(offsets or ())} is in no file")
    if Path(info.relative_path).name != info.relative_path or getattr(info, "transform_descriptors", None):
        raise RunError(f"{folder}: {key} is in {info.relative_path!r}: must be a plain file of the folder")
    return folder / info.relative_path, info.offset, info.length


def _read_object(folder: Path, metadata: Metadata, key: str) -> Any:
    file, start, length = locate(folder, metadata, key, None)
    try:
        with file.open("rb") as stream:
            stream.seek(start)
            content = stream.read(length)
    except OSError as error:
        raise RunError(f"{file}: cannot be read for {key}: {error.strerror}") from error
    return torch_files.load(io.BytesIO(content), f"{file}: {key}")


def read_common(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """What is not sharded: `args`, `iteration` and more; empty where nothing was stored."""
    file = folder / COMMON
    if file.is_file():
        common = torch_files.load(file)
    else:
        keys = [key for key in metadata.state_dict_metadata if key.split("/")[0] == "common_state"]
        if not keys:
            return {}
        common = _read_object(folder, metadata, keys[0])
        common = common[0] if isinstance(common, list) and common else common
    if not isinstance(common, dict):
        raise RunError(f"{folder}: what is stored beside the tensors is a {type(common).__name__}: must be a dict")
    return common


def check_backend(folder: Path) -> None:
    """Raise RunError unless the folder is of the format that is read here."""
    try:
        settings = json.loads((folder / DIST_METADATA).read_text(encoding="utf-8"))
        backend = settings["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / DIST_METADATA}: cannot be read: {type(error).__name__}: {error}") from error
    if backend != "torch_dist":
        raise RunError(f"{folder / DIST_METADATA}: sharded_backend is {backend!r}: must be torch_dist")
