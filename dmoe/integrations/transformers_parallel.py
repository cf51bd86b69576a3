"""Expert parallelism for transformers: an `ep_implementation` on our exchange. Imports transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.distributed.expert_parallel import EPImplementation

from dmoe.moe.dispatch import AllToAllDispatcher
from dmoe.moe.router import Routing


class AllToAllExperts(EPImplementation):
    """Tokens travel to the ranks of their experts and back, as in `AllToAllDispatcher`: a row a pick, with its weight,
    in one message a direction. Chosen by `DistributedConfig(ep_implementation="dmoe_a2a")`.

    Whatever experts implementation the model has then gets rows with one pick each. Ranks of a tensor-parallel group
    hold the same tokens: each sends a part of them, and the results are gathered.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        group = ep_mesh.get_group()
        self._dispatch = AllToAllDispatcher(group, self.num_local_experts * group.size())
        self._config = experts.config

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD, ids_TK, weights_TK = hidden_states, top_k_index, top_k_weights
        shared = self.tp_mesh.size() > 1
        if shared:
            x_TD, ids_TK, weights_TK = (_own_part(t, self.tp_mesh) for t in (x_TD, ids_TK, weights_TK))
        # A dispatcher reads ids and weights alone.
        routing = Routing(ids_TK, weights_TK, logits_TE=weights_TK, scores_TE=weights_TK)
        y_TD = self._dispatch(x_TD, routing, self._experts, None)
        return _all_parts(y_TD, self.tp_mesh, hidden_states.shape[0]) if shared else y_TD

    def _experts(self, x_SD: Tensor, ids_S1: Tensor, weights_S1: Tensor) -> Tensor:
        if self._config._experts_implementation == "dmoe" or x_SD.shape[0]:
            return self.experts_forward(x_SD, ids_S1, weights_S1)
        # Others may leave out what got no token, and the weights must take part in the backward, where ranks wait for
        # their gradients: one row, of zeros, whose result is thrown away.
        x_1D, weights_11 = x_SD.sum(dim=0, keepdim=True), weights_S1.sum(dim=0, keepdim=True)
        return self.experts_forward(x_1D, ids_S1.new_zeros(1, 1), weights_11)[:0]


def _own_part(t: Tensor, mesh: Any) -> Tensor:
    """This rank's rows of what all ranks of the mesh hold. The backward gathers the rows' gradients."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    return DTensor.from_local(t, mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(0)]).to_local()


def _all_parts(y: Tensor, mesh: Any, num_tokens: int) -> Tensor:
    """The rows of all ranks."""
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((num_tokens, y.shape[1]))
    parts = DTensor.from_local(y.contiguous(), mesh, [Shard(0)], run_check=False, shape=shape, stride=(shape[1], 1))
    return parts.full_tensor()
