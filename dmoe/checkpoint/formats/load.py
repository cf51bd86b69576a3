"""Weights into a model: whole, or this rank's part of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmoe.checkpoint.formats.dmoe_run import is_one as is_run
from dmoe.checkpoint.formats.extra_files import CONFIG
from dmoe.checkpoint.formats.names import EMBEDDING, HEAD, has_expert_rows, tensor_shapes
from dmoe.checkpoint.formats.source import open_source, read_config
from dmoe.checkpoint.formats.store import Source
from dmoe.checkpoint.parts import Parts, as_parts, model_tensors
from dmoe.config import ModelConfig, require
from dmoe.errors import ConfigError

if TYPE_CHECKING:
    from dmoe.models import Decoder
    from dmoe.parallel import ParallelMesh


def load_into(model: Parts, path: Path | str, *, kind: str | None = None) -> None:
    """Fill a `Decoder`, or this rank's parts of one, from a directory of any format.

    Parameters and buffers keep device, dtype and layout (DTensors of FSDP, expert and tensor parallelism). Each rank
    reads the rows of its own experts, and every other tensor that it has a part of. Names that a part lacks, other
    pipeline stages', are not read. From a run, collective over all ranks, which share the work of verifying it.

    Raises:
        ConfigError: the directory holds another model.
        RunError: damaged files.
        ValueError: the model is on the meta device.
    """
    path = Path(path)
    parts = as_parts(model)
    if is_run(path) and kind in (None, "dmoe"):
        from dmoe.checkpoint.load import load_model_weights

        load_model_weights(path, parts)
        return
    tensors = model_tensors(parts)
    if any(tensor.is_meta for holders in tensors.values() for tensor in holders):
        raise ValueError("the model is on the meta device: materialise it before loading weights")
    source = open_source(path, kind)
    for part in parts:
        if isinstance(getattr(part, "config", None), ModelConfig):
            _check_same(part.config, source.config)  # type: ignore[arg-type]
    fill(tensors, source)


def _check_same(ours: ModelConfig, loaded: ModelConfig) -> None:
    """A rank's part does not show how many layers there are; its configuration does."""
    shapes, wanted = tensor_shapes(ours), tensor_shapes(loaded)
    for name in sorted(shapes.keys() ^ wanted.keys()):
        if name == HEAD and loaded.tie_embeddings:
            continue  # the head is filled with the embedding
        where = "model" if name in shapes else "files"
        raise ConfigError(f"{name} is only in the {where}: must be the same model as in the files")


@torch.no_grad()
def fill(tensors: dict[str, list[Tensor]], source: Source) -> None:
    """Copy from `source` into tensors by name, of which a rank may hold a part. Raises ConfigError if they differ."""
    shapes = tensor_shapes(source.config)
    tied = HEAD not in shapes
    for name, holders in tensors.items():
        wanted = shapes.get(EMBEDDING if tied and name == HEAD else name)
        if wanted is None:
            raise ConfigError(f"{name} is not in the files: must be the same model as in the files")
        for tensor in holders:
            shape = tuple(tensor.shape)
            require(shape == wanted, f"the shape of {name}", list(shape), f"{list(wanted)}, as in the files")
    for name, holders in tensors.items():
        if tied and name == HEAD and _same_storage(holders, tensors.get(EMBEDDING, [])):
            continue
        _fill(name, holders, source, EMBEDDING if tied and name == HEAD else name)


def _fill(name: str, holders: list[Tensor], source: Source, origin: str) -> None:
    from dmoe.moe.sharded import copy_shard, local, owned_indices

    whole: Tensor | None = None
    for tensor in holders:
        owned, shard = owned_indices(tensor), local(tensor)
        if shard.numel() == 0:
            continue
        if has_expert_rows(name):
            experts = [expert for run in owned[0] for expert in run]
            for row, expert in zip(shard, experts):
                content = source.read(origin, expert)
                for dim, runs in enumerate(owned[1:]):
                    parts = [content.narrow(dim, run.start, len(run)) for run in runs]
                    content = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
                row.copy_(content)
            continue
        whole = source.read(origin) if whole is None else whole
        if shard is tensor:
            tensor.copy_(whole)
        else:
            copy_shard(tensor, whole)


def _same_storage(holders: list[Tensor], others: list[Tensor]) -> bool:
    from dmoe.moe.sharded import local

    places = [local(tensor).data_ptr() for tensor in holders]
    return places == [local(tensor).data_ptr() for tensor in others]


def from_pretrained(
    path_or_hub_id: str | Path,
    *,
    mesh: ParallelMesh | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """A trained model in evaluation mode, from a directory of any format or from the Hugging Face hub.

    Args:
        path_or_hub_id: a directory (Hugging Face, run or checkpoint of ours, Megatron, MegaBlocks), or a name such as
            "mistralai/Mixtral-8x7B-v0.1", which is downloaded (`pip install huggingface_hub`) or taken from its cache.
        mesh: spreads the model over ranks, each of which reads its part; without pipeline parallelism. Collective.
        dtype: of the weights. None: fp32.
        device: None: the CPU, or with a mesh this rank's device.

    Raises:
        ConfigError: no such directory and no download, or a model that we do not have.
        RunError: damaged files.
    """
    from dmoe.models import Decoder

    path = local_folder(path_or_hub_id)
    config = read_config(path)
    dtype = torch.float32 if dtype is None else dtype
    if mesh is None:
        model = Decoder.on_meta(config).to(dtype)
        device = "cpu" if device is None else device
    else:
        model = _spread(config, mesh, dtype)
        device = _mesh_device(mesh) if device is None else device
    model.to_empty(device=device)
    load_into(model, path)
    return model.eval()


def _spread(config: ModelConfig, mesh: ParallelMesh, dtype: torch.dtype) -> Decoder:
    from dmoe.config import TrainConfig
    from dmoe.parallel import parallelize

    require(mesh.config.pp == 1, "parallel.pp", mesh.config.pp, "1: use parallelize and load_into for its stages")
    # A layout is checked against a batch; the smallest that fits says no more than the layout itself.
    seq_len = 2 * mesh.config.cp * mesh.config.tp
    train = TrainConfig(batch_size=mesh.dp_size, micro_batch_size=mesh.dp_size, seq_len=seq_len)
    (model,) = parallelize(config, mesh, train, dtype=dtype)
    return model


def _mesh_device(mesh: ParallelMesh) -> torch.device:
    kind = mesh.dense.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


def local_folder(path_or_hub_id: str | Path) -> Path:
    """The directory itself, or where the hub's client put it. Raises ConfigError where it can be neither."""
    path = Path(path_or_hub_id).expanduser()
    name = str(path_or_hub_id)
    if path.exists():
        return path
    wanted = "a directory, or NAME/MODEL on the Hugging Face hub"
    if isinstance(path_or_hub_id, Path) or name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ConfigError(f"model is {name!r}: must be {wanted}; there is no such directory")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"model is {name!r}: must be {wanted}, which needs: pip install huggingface_hub") from None
    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # of the network, of the hub, of the cache
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model is {name!r}: must be {wanted}; no such directory, and the download failed "
            f"({type(error).__name__}: {reason}); offline, give the directory of a copy with {CONFIG}"
        ) from None
