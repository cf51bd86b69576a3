"""Expert parallel: each rank of "ep" holds E / ep experts of every MoE layer, and tokens travel to them."""

from __future__ import annotations

from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from dmoe.moe import BatchGroups, moe_layers
from dmoe.moe.dispatch import AllToAllDispatcher
from dmoe.moe.dispatch_tokens import TokenDispatcher
from dmoe.parallel.mesh import ParallelMesh


def apply_expert_parallel(part: nn.Module, mesh: ParallelMesh) -> None:
    """Tell every MoE layer which ranks share its batch and, with ep > 1, spread its experts. In place."""
    for layer in moe_layers(part).values():
        batch, sequence = (group if group.size() > 1 else None for group in (mesh.batch_group, mesh.sequence_group))
        layer.groups = BatchGroups(batch, sequence)
        if mesh.config.ep == 1:
            continue
        axis = mesh.experts["ep"]
        for name, parameter in layer.experts.named_parameters():
            spread = distribute_tensor(parameter.detach(), axis, [Shard(0)], src_data_rank=None)
            setattr(layer.experts, name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
        group, num_experts, config = axis.get_group(), layer.config.num_experts, mesh.config
        if config.ep_sends == "tokens":
            layer.dispatcher = TokenDispatcher(group, num_experts, payload=config.exchange)
        else:
            layer.dispatcher = AllToAllDispatcher(group, num_experts, payload=config.exchange, max_rows=config.max_rows)
