"""Our weights under the names of a `SequentialMLP` in Megatron-core's distributed checkpoints.

Stored, with the axes that the caller puts before (layers, unless each has keys of its own), are `router.weight` [E, D],
`experts.experts.linear_fc1.weight` [E, 2F, D] with rows gate then up, `experts.experts.linear_fc2.weight` [E, D, F]
and `shared_experts.linear_fc1.weight`, `.linear_fc2.weight`: what our tensors are, so that both layers read the files
of either, at any expert parallelism, the state of the optimiser included.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmoe.config import require

if TYPE_CHECKING:
    from dmoe.integrations.megatron_layer import DMoELayer

EXPERTS = {
    "gate_up_proj": "linear_fc1.weight",
    "up_proj": "linear_fc1.weight",
    "gate_up_bias": "linear_fc1.bias",
    "up_bias": "linear_fc1.bias",
    "down_proj": "linear_fc2.weight",
    "down_bias": "linear_fc2.bias",
}
REPLICATED = {
    "router.weight": "router.weight",
    "router.bias": "router.bias",
    "router.e_score_correction_bias": "router.expert_bias",
    "shared_experts.up_proj.weight": "shared_experts.linear_fc1.weight",
    "shared_experts.down_proj.weight": "shared_experts.linear_fc2.weight",
    "shared_expert_gate.weight": "shared_experts.gate_weight",
    "fc1_latent_proj.weight": "fc1_latent_proj.weight",
    "fc2_latent_proj.weight": "fc2_latent_proj.weight",
}
"""What each rank of an expert group has in full: our name, stored name."""
GATE_AND_UP = ("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight")
"""The halves of one stored tensor."""
SUFFIXES = ("_w", "_v")
"""Of the keys of gate and up with metadata `singleton_local_shards`, where each has its own, as each expert has."""


def sharded_state_dict(layer: DMoELayer, prefix: str, offsets: tuple[Any, ...], metadata: dict[str, Any] | None) -> Any:
    """Megatron's map from our parameters to stored tensors, in the form that `MegatronModule` defines."""
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

    metadata = ensure_metadata_has_dp_cp_group(metadata)
    singleton = metadata.get("singleton_local_shards", False)
    result = {}
    for name, tensor in layer.moe.state_dict(keep_vars=True).items():
        owner, _, leaf = name.rpartition(".")
        if owner == "experts":
            build = _expert_factory(layer, f"{prefix}experts.experts.{EXPERTS[leaf]}", leaf, tensor, offsets, singleton)
        else:
            build = _replicated(layer, prefix, name, tensor, offsets, metadata)
        result[f"{prefix}moe.{name}"] = build
    result.update(_extra_states(layer, prefix, offsets, metadata, singleton))
    return result


def _replicated(
    layer: DMoELayer, prefix: str, name: str, tensor: Tensor, offsets: tuple[Any, ...], metadata: dict[str, Any]
) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    place: tuple[Any, ...] = ()
    stored, shared = REPLICATED.get(name), layer.moe.shared_experts
    if name in GATE_AND_UP and shared is not None and shared.gate_proj is not None:
        stored, half = REPLICATED["shared_experts.up_proj.weight"], GATE_AND_UP.index(name)
        if metadata.get("singleton_local_shards", False):
            stored += SUFFIXES[half]
        else:
            place = ((len(offsets), half, 2),)  # axis, index, number of parts
    assert stored is not None, f"no stored name for {name}"
    replica_id = (0, layer.groups.tp.rank(), metadata["dp_cp_group"].rank())
    return ShardedTensor.from_rank_offsets(
        prefix + stored, tensor, *offsets, *place, replica_id=replica_id, prepend_axis_num=len(offsets)
    )


def _expert_factory(
    layer: DMoELayer, key: str, leaf: str, tensor: Tensor, offsets: tuple[Any, ...], singleton: bool
) -> Any:
    """Gate and up rows are boxes of their own. A factory applies to the tensors of the optimiser as to the weights."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    num_parts = 2 if leaf.startswith("gate_up") else 1
    place = partial(_place_singly if singleton else _place, layer, num_parts, offsets)
    return ShardedTensorFactory(key, tensor, place, _merge, (0, 0, layer.groups.expt_dp.rank()))


@torch.no_grad()
def _place(
    layer: DMoELayer, num_parts: int, offsets: tuple[Any, ...], key: str, tensor: Tensor, replica_id: Any, flat: Any
) -> list[Any]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    _require_whole(flat)
    axis, ep = len(offsets), layer.groups.ep
    experts = (axis, ep.rank(), ep.size())
    return [
        ShardedTensor.from_rank_offsets(
            key, part.contiguous(), *offsets, experts, (axis + 1, i, num_parts),
            replica_id=replica_id, prepend_axis_num=axis,
        )
        for i, part in enumerate(tensor.chunk(num_parts, dim=1))
    ]  # fmt: skip


@torch.no_grad()
def _place_singly(
    layer: DMoELayer, num_parts: int, offsets: tuple[Any, ...], key: str, tensor: Tensor, replica_id: Any, flat: Any
) -> list[Any]:
    """Each expert under a key of its own."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    _require_whole(flat)
    head, _, tail = key.rpartition("experts.linear_")
    suffixes = SUFFIXES if num_parts == 2 else ("",)
    return [
        [
            ShardedTensor.from_rank_offsets(
                f"{head}experts.{number}.linear_{tail}{suffix}", expert.contiguous(), *offsets,
                replica_id=replica_id, prepend_axis_num=len(offsets),
            )
            for number, expert in zip(layer.local_expert_indices, part)
        ]
        for suffix, part in zip(suffixes, tensor.chunk(num_parts, dim=1))
    ]  # fmt: skip


def _require_whole(flat: Any) -> None:
    wanted = "None: store the distributed optimizer as fully_reshardable, not as fully_sharded_model_space"
    require(flat is None, "flattened_range", flat, wanted)


@torch.no_grad()
def _merge(parts: list[Any]) -> Tensor:
    return torch.cat([torch.stack(part) if isinstance(part, list) else part for part in parts], dim=1)


def _extra_states(
    layer: DMoELayer, prefix: str, offsets: tuple[Any, ...], metadata: dict[str, Any], singleton: bool
) -> dict[str, Any]:
    """The empty objects that Megatron's linear layers store, and miss if they are not there."""
    from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

    objects = {}
    tp_rank = layer.groups.tp.rank()
    for linear in ("linear_fc1", "linear_fc2"):
        for number in layer.local_expert_indices:
            key = f"{prefix}experts.experts.{f'{number}.' if singleton else ''}{linear}._extra_state"
            place = offsets if singleton else (*offsets, (len(offsets), number, layer.moe.config.num_experts))
            objects[f"{prefix}moe.experts.{number}.{linear}._extra_state"] = make_sharded_object_for_checkpoint(
                None, key, place, (0, 0, layer.groups.expt_dp.rank())
            )
        if layer.moe.shared_experts is not None:
            key = f"{prefix}shared_experts.{linear}._extra_state"
            objects[f"{prefix}moe.shared_experts.{linear}._extra_state"] = make_sharded_object_for_checkpoint(
                None, key, offsets, (0, tp_rank, metadata["dp_cp_group"].rank())
            )
    return objects
