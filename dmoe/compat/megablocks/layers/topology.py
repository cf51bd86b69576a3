"""Where the non-zero blocks of the hidden states are, when rows of experts are padded to blocks of 128."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Topology:
    """The fields and the constructor of an `stk.Matrix`, a matrix of which blocks of 128 x 128 are stored.

    Block row r holds 128 rows of one expert, and its blocks are the features of that expert, `offsets[r]` to
    `offsets[r + 1]` among the stored blocks. `*_t` say the same of the transpose.
    """

    shape: tuple[int, int]
    data: Tensor
    """[blocks, 128, 128]; without storage, on the meta device."""
    row_indices: Tensor
    column_indices: Tensor
    offsets: Tensor
    column_indices_t: Tensor
    offsets_t: Tensor
    block_offsets_t: Tensor

    def size(self) -> torch.Size:
        """(rows, columns)."""
        return torch.Size(self.shape)


def _block_rows(topo: Any) -> int:
    return max(1, topo.offsets.numel() - 1)


def features_of(topo: Any) -> int:
    """F: columns of one expert, of which every block row has a block for each 128. 128 if there are no rows."""
    return max(1, topo.column_indices.numel() // _block_rows(topo)) * 128


def tokens_per_expert_of(topo: Any, num_experts: int) -> Tensor:
    """int64 [num_experts]: rows of each expert, padding included. No host synchronisation."""
    experts = topo.column_indices.long() // (features_of(topo) // 128)
    counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, experts, torch.ones_like(experts))
    return counts * 128 // (features_of(topo) // 128)
