"""`dMoE`, which computes every pick.

Legend: T tokens, D width, R sorted picks, e experts of this rank, F their features on this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.compat.megablocks import ops
from dmoe.compat.megablocks.layers import dmlp_registry, mlp, moe, mpu
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.topology import Topology
from dmoe.config import require
from dmoe.ops import sort_by_expert


def promote_scalar(x: Tensor) -> Tensor:
    """A tensor without dims as one with one dim."""
    return x.view(1) if x.dim() == 0 else x


class ParallelDroplessMLP(moe.ParallelMLP):
    """The experts of `dMoE`. Parameters: `mlp.w1`, `mlp.w2`, for "glu" `mlp.v1` (see `mlp.SparseMLP`), and `bias` [D].

    The methods with "sparse" in their names, `topology` and `indices_and_padded_bins` are for callers that work with
    groups padded to blocks of 128 rows; the layer itself pads nothing.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self.hidden_size = args.hidden_size
        self.ffn_hidden_size = mpu.features_per_rank(args)
        self.blocking = 128
        max_column = self.ffn_hidden_size * self.num_experts // self.blocking
        self.transpose_sort_end_bit = max((max(max_column, 1) - 1).bit_length(), 1)

    def _init_mlp(self, args: Arguments) -> nn.Module:
        # A seeded layer must have the weights it has in MegaBlocks, which draws those of `MoE` first and drops them.
        for init_method in (args.init_method, args.output_layer_init_method):
            sizes = args.moe_num_experts, args.ffn_hidden_size, args.hidden_size
            mlp.create_moe_expert_weights(args, *sizes, init_method)
        return dmlp_registry.get(args)

    def _keep(self, ids_TK: Tensor, weights_TK: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        return ids_TK, weights_TK

    def indices_and_padded_bins(self, top_experts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """`indices_and_bins`, with the ends of groups padded to blocks before tokens_per_expert."""
        indices, bin_ids, bins, tokens_per_expert = self.indices_and_bins(top_experts)
        padded = (tokens_per_expert + self.blocking - 1) // self.blocking * self.blocking
        return indices, bin_ids, bins, padded.cumsum(0, dtype=torch.int32), tokens_per_expert

    def sparse_transpose(
        self, size: tuple[int, int], row_indices: Tensor, column_indices: Tensor, offsets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(column_indices_t, offsets_t, block_offsets_t) of the transpose of a matrix of blocks."""
        order, _, ends = sort_by_expert(column_indices.view(-1, 1), size[1] // self.blocking)
        offsets_t = torch.cat([ends.new_zeros(1), ends])
        return row_indices[order], offsets_t, order.int()

    def topology(self, x: Tensor, padded_bins: Tensor) -> Topology:
        """Where the hidden states [rows of `x`, e * F] of padded groups have blocks.

        Raises:
            ConfigError: F is no multiple of 128.
        """
        features, block = self.ffn_hidden_size, self.blocking
        require(features % block == 0, "ffn_hidden_size of a rank", features, f"a multiple of {block} for a topology")
        rows, columns = x.shape[0] // block, features // block
        device = x.device
        column_indices = ops.topology(padded_bins, block, rows, columns)
        row_indices = torch.arange(rows, device=device, dtype=torch.int32).repeat_interleave(columns)
        offsets = torch.arange(0, rows * columns + 1, columns, device=device, dtype=torch.int32)
        shape = x.shape[0], features * mpu.experts_per_rank(self.args)
        data = torch.empty(rows * columns, block, block, device="meta", dtype=x.dtype)
        transpose = self.sparse_transpose(shape, row_indices, column_indices, offsets)
        return Topology(shape, data, row_indices, column_indices, offsets, *transpose)

    def sparse_forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        """`forward_once`."""
        return self.forward_once(x, expert_weights, top_experts)

    def grouped_forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        """`forward_once`."""
        return self.forward_once(x, expert_weights, top_experts)

    def sparse_permute_and_compute(
        self,
        x: Tensor,
        tokens_per_expert: Tensor | None,
        indices: Tensor,
        bin_ids: Tensor,
        expert_weights: Tensor | None,
        bins: Tensor,
        expert_capacity: int,
        top_k: int,
    ) -> Tensor:
        """`permute_and_compute`; the capacity is not read."""
        return self.permute_and_compute(
            x, tokens_per_expert, indices, bin_ids, expert_weights, bins, expert_capacity, top_k
        )

    grouped_permute_and_compute = sparse_permute_and_compute


class dMoE(moe.MoE):
    """A mixture of experts that drops nothing: `MoE` with `ParallelDroplessMLP` for its experts."""

    def _init_experts_mlp(self, args: Arguments) -> ParallelDroplessMLP:
        return ParallelDroplessMLP(args)
