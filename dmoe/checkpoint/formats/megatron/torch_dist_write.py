"""Writing Megatron-core's distributed checkpoints, an expert or a layer's projection at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmoe.checkpoint.formats.mapping import Stored
from dmoe.checkpoint.formats.megatron.assemble import assemble
from dmoe.checkpoint.formats.megatron.folders import DIST_METADATA
from dmoe.checkpoint.formats.megatron.legacy import extra_state_owner
from dmoe.checkpoint.formats.megatron.names import Form, NormNames, rank_mapping, whole_model
from dmoe.checkpoint.formats.megatron.torch_dist import COMMON, FUSED_MLP_NORM, MLP_NORM, Place, axes, places
from dmoe.checkpoint.formats.store import Source
from dmoe.config import ModelConfig


class Chunk(NamedTuple):
    """A tensor of one layer or expert and its place in DCP's."""

    stored: Stored
    place: Place
    sizes: tuple[int, ...]
    """Of the axes that `place.at` counts."""


def chunks(config: ModelConfig, padded_vocab: int, norms: NormNames) -> Iterator[Chunk]:
    """All tensors of the model. Layers share tensors if they are alike; else each has keys of its own."""
    form = Form(padded_vocab, "local", "sequential")  # the names that keys are made of
    alike = len(config.moe_layers()) in (0, config.num_layers)
    mixtures = set(config.moe_layers())
    for stored in rank_mapping(config, whole_model(config), form):
        shared, *others = places(stored.name)
        (place,) = shared if alike or not others else others[0]
        if stored.name.endswith(MLP_NORM) and (norms == "local" or int(stored.name.split(".")[2]) not in mixtures):
            # Named after the layer that holds it; with the local layers in any case.
            place = place._replace(key=place.key.replace(MLP_NORM, FUSED_MLP_NORM))
        yield Chunk(stored, place, axes(place, config))


def extra_states(all_chunks: list[Chunk]) -> list[str]:
    """Keys of the empty objects beside the linear layers; Megatron misses those that are not there."""
    keys = []
    for chunk in all_chunks:
        key = chunk.place.key
        if extra_state_owner(chunk.stored.name) is None or "output_layer" in key:
            continue
        at, sizes = (".".join(map(str, numbers)) for numbers in (chunk.place.at or (0,), chunk.sizes or (1,)))
        keys.append(f"{key.rpartition('.')[0]}._extra_state/shard_{at}_{sizes}")
    return list(dict.fromkeys(keys))  # a layer has a weight and may have a bias


def write(
    source: Source, folder: Path, padded_vocab: int, norms: NormNames, common: dict[str, Any], dtype: torch.dtype | None
) -> None:
    """Write the checkpoint into `folder`, which exists. Memory holds one tensor of a layer or expert, and one a key."""
    import torch.distributed.checkpoint as dcp

    from dmoe.checkpoint import dcp_io
    from dmoe.checkpoint.formats.mapped import stored_outlines

    all_chunks = list(chunks(source.config, padded_vocab, norms))
    outlines = stored_outlines(source, [chunk.stored for chunk in all_chunks], dtype)
    dtypes = {name: outline.dtype for name, outline in outlines.items()}
    planner = _planner(source, all_chunks, dtypes, extra_states(all_chunks))
    with dcp_io._unwrapped(), dcp_io._quiet():
        writer = dcp_io._Writer(folder, sync_files=False, per_thread_copy_ahead=0)
        dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
    torch.save(common, folder / COMMON)
    settings = {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    (folder / DIST_METADATA).write_text(json.dumps(settings), encoding="utf-8")


def _planner(source: Source, all_chunks: list[Chunk], dtypes: dict[str, torch.dtype], objects: list[str]) -> Any:
    """DCP asks it what there is, and for each tensor when its turn comes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

    by_index: dict[Any, Chunk] = {}
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in objects]
    counts: dict[str, int] = {}
    for chunk in all_chunks:
        key, at = chunk.place
        offsets = torch.Size([*at, *[0] * len(chunk.stored.shape)])
        index = MetadataIndex(key, offsets, counts.setdefault(key, 0))
        counts[key] += 1
        by_index[index] = chunk
        data = TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, torch.Size([1] * len(at) + list(chunk.stored.shape))),
            properties=TensorProperties(dtype=dtypes[chunk.stored.name]),
            size=torch.Size([*chunk.sizes, *chunk.stored.shape]),
        )
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))

    class Planner(dcp.DefaultSavePlanner):
        def create_local_plan(self) -> SavePlan:
            self.plan = SavePlan(items, planner_data={})
            return self.plan

        def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
            if write_item.type == WriteItemType.BYTE_IO:
                return _nothing()
            chunk = by_index[write_item.index]
            tensor = assemble(source, chunk.stored, dtypes[chunk.stored.name])
            return tensor[(None,) * len(chunk.place.at)]

    return Planner()


def _nothing() -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save([None], buffer)  # Megatron stores a list, with the object of each that shares the key
    buffer.seek(0)
    return buffer
