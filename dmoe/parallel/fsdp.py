"""Data parallel: FSDP2 over dp_shard x cp, HSDP with dp_replicate; the experts over what expert parallelism leaves.

Losses are divided by the tokens of the whole batch, so gradients are summed over ranks, never averaged: an expert that
saw tokens of every rank and a norm that saw its own rank's need no different factors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from dmoe.config import SPLIT_BACKWARD_SCHEDULES
from dmoe.models import Decoder
from dmoe.moe import MoE
from dmoe.parallel.mesh import ParallelMesh


def apply_fsdp(part: Decoder, mesh: ParallelMesh, gather_dtype: torch.dtype | None) -> None:
    """Shard a part in place: each layer, its experts, the head, and the rest are gathered as units.

    Args:
        gather_dtype: dtype in which experts and head are gathered, None for their own. Autocast would cast them to it
            anyway, so gathering fewer bytes changes no number. Other weights are few and are gathered as they are.
    """
    # A split backward looks for the weights that the forward used: freed ones would lose their gradients.
    split = mesh.config.pp > 1 and mesh.config.schedule in SPLIT_BACKWARD_SCHEDULES
    reshard = mesh.config.reshard_after_forward and not split
    # It warns of outputs that are views, which an operation in place would harm; nothing here works in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    dense, experts = mesh.data_axes(mesh.dense), mesh.data_axes(mesh.dense if mesh.config.ep == 1 else mesh.experts)
    elsewhere = {p for layer in _moe_layers(part) for p in layer.experts.parameters()}
    if experts is not None:
        for moe in _moe_layers(part):
            fully_shard(
                moe.experts, mesh=experts, reshard_after_forward=reshard,
                mp_policy=_policy(moe.experts, gather_dtype),
                shard_placement_fn=_expert_placements(moe, mesh, experts.shape[-1]),
            )  # fmt: skip
    if dense is not None:
        for layer in part.blocks:
            fully_shard(layer, mesh=dense, reshard_after_forward=reshard, ignored_params=elsewhere)
        # Head, embeddings and last norm are kept from forward to backward where this follows at once and needs them.
        reshard = reshard and mesh.config.pp > 1
        if part.is_last and not part.config.tie_embeddings:
            policy = _policy(part.lm_head, gather_dtype)
            fully_shard(part.lm_head, mesh=dense, reshard_after_forward=reshard, mp_policy=policy)
        fully_shard(part, mesh=dense, reshard_after_forward=reshard, ignored_params=elsewhere)
        part.register_forward_hook(_reshard_without_gradients)
        if mesh.config.pp == 1:
            part.register_forward_pre_hook(_reshard, prepend=True)
        _prefetch(part)
    for module in fsdp_modules(part):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else it multiplies by 1, in a way that gloo does not know


def _policy(unit: nn.Module, gather_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    if next(unit.parameters()).dtype == torch.float64:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _reshard(part: nn.Module, *_: object) -> None:
    """What was kept for a backward that never came, as after an error, would miss the next change of the weights."""
    for unit in fsdp_modules(part):
        unit.reshard()


def _reshard_without_gradients(part: nn.Module, *_: object) -> None:
    """No backward will come."""
    if not torch.is_grad_enabled():
        _reshard(part)


def _expert_placements(moe: MoE, mesh: ParallelMesh, size: int) -> Callable[[nn.Parameter], Shard | None]:
    """Experts are cut by expert, or, when there are more ranks than experts, by model width: FSDP would fill a cut of
    too few experts up, and every rank would gather the filling."""
    width, num_local = moe.config.expert_input_size, moe.config.num_experts // mesh.config.ep
    by_width = size > num_local and width % size == 0
    dims = {"gate_up_proj": 2, "up_proj": 2, "down_proj": 1}
    placements = {
        parameter: Shard(dims[name]) for name, parameter in moe.experts.named_parameters() if by_width and name in dims
    }
    return placements.get


def fsdp_modules(part: nn.Module) -> list[FSDPModule]:
    """The units of a part."""
    return [module for module in part.modules() if isinstance(module, FSDPModule)]


def sum_over_replicas(part: nn.Module, on: bool) -> None:
    """Whether the backward passes from now on also sum gradients over dp_replicate; only the last of a step must."""
    for module in fsdp_modules(part):
        module.set_requires_all_reduce(on, recurse=False)


def _moe_layers(part: Decoder) -> list[MoE]:
    return [layer.mlp for layer in part.blocks if isinstance(layer.mlp, MoE)]


def _prefetch(part: Decoder) -> None:
    """Gather the next layer while one computes. Reading the counts of an exchange on the host would else delay it."""
    units = [[m for m in (layer, getattr(layer.mlp, "experts", None)) if isinstance(m, FSDPModule)]
             for layer in part.blocks]  # fmt: skip
    for this, following in pairwise(units):
        this[0].set_modules_to_forward_prefetch(following)
        following[0].set_modules_to_backward_prefetch(list(reversed(this)))
    if units and part.is_last and isinstance(part.lm_head, FSDPModule):
        units[-1][0].set_modules_to_forward_prefetch([part.lm_head])
