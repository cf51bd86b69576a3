"""How the experts are spread over the expert-parallel group, and the mark that their parameters carry.

With world ranks in the group, `expert_sharding_degree` = min(world, experts) ranks hold different experts, and
`hidden_sharding_degree` = world / that many ranks hold different features of the same experts: more than 1 only when
there are more ranks than experts. Rank r of the group holds block r % esd of the experts and block r // esd of the
features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from dmoe.errors import ConfigError

if TYPE_CHECKING:
    from dmoe.compat.megablocks.layers.arguments import Arguments

_MARK = "expert_model_parallel"


def is_moe_param(tensor: Tensor) -> bool:
    """Whether `tensor` was marked as a parameter of a mixture-of-experts layer, spread over ranks or not."""
    return hasattr(tensor, _MARK)


def param_is_expert_model_parallel(param: Tensor) -> bool:
    """Whether `param` is spread over expert-parallel ranks, so that its gradient is not averaged over them."""
    return bool(getattr(param, _MARK, False))


def set_expert_model_parallel_attributes(tensor: Tensor, is_parallel: bool) -> None:
    """Mark a parameter: its attribute `expert_model_parallel` becomes `is_parallel`.

    Raises:
        ConfigError: the parameter has the mark already.
    """
    if is_moe_param(tensor):
        raise ConfigError(f"tensor.{_MARK} is {getattr(tensor, _MARK)}: must not be set yet")
    setattr(tensor, _MARK, is_parallel)


def copy_expert_model_parallel_attributes(destination_tensor: Tensor, source_tensor: Tensor) -> None:
    """Give `destination_tensor` the mark of `source_tensor`, if that has one."""
    if is_moe_param(source_tensor):
        setattr(destination_tensor, _MARK, getattr(source_tensor, _MARK))


def get_expert_parallel_world_size(args: Arguments) -> int:
    """Ranks of `args.expert_parallel_group` (None: all ranks); 1 without expert parallelism."""
    return dist.get_world_size(args.expert_parallel_group) if args.moe_expert_model_parallelism else 1


def get_expert_parallel_rank(args: Arguments) -> int:
    """This rank's place in `args.expert_parallel_group`; 0 without expert parallelism."""
    return dist.get_rank(args.expert_parallel_group) if args.moe_expert_model_parallelism else 0


def get_weight_parallel_world_size(args: Arguments) -> int:
    """Ranks of `args.weight_parallel_group`, a setting of releases before 0.6; 1 without it."""
    if not getattr(args, "moe_weight_parallelism", False):
        return 1
    return dist.get_world_size(args.weight_parallel_group)


def get_weight_parallel_rank(args: Arguments) -> int:
    """This rank's place in `args.weight_parallel_group`; 0 without weight parallelism."""
    if not getattr(args, "moe_weight_parallelism", False):
        return 0
    return dist.get_rank(args.weight_parallel_group)


def expert_sharding_degree(args: Arguments) -> int:
    """Into how many blocks the experts are divided.

    Raises:
        ConfigError: it does not divide `args.moe_num_experts`.
    """
    degree = min(get_expert_parallel_world_size(args), args.moe_num_experts)
    if args.moe_num_experts % degree != 0:
        raise ConfigError(
            f"moe_num_experts is {args.moe_num_experts}: must be a multiple of {degree}, the ranks of the "
            "expert-parallel group that divide the experts"
        )
    return degree


def hidden_sharding_degree(args: Arguments) -> int:
    """Into how many blocks the features of each expert are divided.

    Raises:
        ConfigError: the group's size is no multiple of the experts, or `args.ffn_hidden_size` none of the degree.
    """
    world_size, experts_degree = get_expert_parallel_world_size(args), expert_sharding_degree(args)
    degree = world_size // experts_degree
    if experts_degree * degree != world_size:
        raise ConfigError(
            f"moe_num_experts is {args.moe_num_experts}: must divide {world_size}, the ranks of the expert-parallel "
            "group, or be a multiple of it"
        )
    if args.ffn_hidden_size % degree != 0:
        raise ConfigError(
            f"ffn_hidden_size is {args.ffn_hidden_size}: must be a multiple of {degree}, the ranks that share an expert"
        )
    return degree


def experts_per_rank(args: Arguments) -> int:
    """Experts that a rank holds, of all of their features or of a block of these."""
    return args.moe_num_experts // expert_sharding_degree(args)


def features_per_rank(args: Arguments) -> int:
    """Features that a rank holds of each of its experts."""
    return args.ffn_hidden_size // hidden_sharding_degree(args)


def synchronized_print(group: dist.ProcessGroup | None, *x: Any) -> None:
    """Print `x` on every rank of `group` (None: all), one rank after another. Collective."""
    for rank in range(dist.get_world_size(group)):
        dist.barrier(group)
        if rank == dist.get_rank(group):
            print(f"rank = {rank}", *x, flush=True)
