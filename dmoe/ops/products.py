"""Matrix products of groups of rows with a matrix each, and how the groups are laid out for them.

Legend: R rows grouped by expert, E experts, M and N widths, T tokens, K picks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.permute import Permutation, first_rows, pad_groups, sort_by_expert

# On the CPU, in half precision, the library behind a matrix product prepares code for every number of rows that it has
# not seen, and the groups have new sizes at every step: preparing takes longer than computing. So groups are padded. To
# one common size, for one batched product, while that is small (multiply-adds of an up projection) and adds few
# rows (all over needed); else each to a multiple of about an eighth of the mean size.
_BATCH_LIMIT = 2**26
_PADDING_LIMIT = 1.6


def padded_sizes(counts_E: Tensor, weights_per_expert: int) -> Tensor:
    """Rows for each expert: few different numbers, whatever the counts."""
    mean = counts_E.sum() / counts_E.numel()
    step = 2 ** max(0, int(mean / 8).bit_length() - 1)
    sizes_E = (counts_E + step - 1) // step * step
    largest = int(sizes_E.max())
    small = largest * weights_per_expert <= _BATCH_LIMIT
    return torch.full_like(sizes_E, largest) if small and largest <= _PADDING_LIMIT * mean else sizes_E


def permute_rows(topk_ids_TK: Tensor, gate_up_proj: Tensor, may_resize: bool) -> Permutation:
    """The picks grouped by expert. With `may_resize` (on the CPU) without rows for picks of no expert, and in half
    precision in groups padded for fast products."""
    permutation = sort_by_expert(topk_ids_TK, gate_up_proj.shape[0])
    if not may_resize or topk_ids_TK.numel() == 0:
        return permutation
    permutation = first_rows(permutation, int(permutation.offsets_E[-1]))
    if gate_up_proj.element_size() != 2:
        return permutation
    counts_E = torch.diff(permutation.offsets_E.long(), prepend=topk_ids_TK.new_zeros(1, dtype=torch.int64))
    return pad_groups(permutation, padded_sizes(counts_E, gate_up_proj[0].numel()))


def is_batch(x_TD: Tensor, order_R: Tensor, inverse_TK: Tensor, offsets_E: Tensor) -> bool:
    """Whether the groups have one common size and are all of the rows, as padding makes them. They are looked at only
    where the number of rows shows that it depends on the data: elsewhere that would synchronise, or there is no data
    (when a run is planned), and an fp32 product by groups keeps its bits."""
    if x_TD.device.type != "cpu" or x_TD.element_size() != 2 or order_R.numel() == inverse_TK.numel():
        return False
    size = order_R.numel() // offsets_E.numel()
    groups_are_even = offsets_E.tolist() == [size * (e + 1) for e in range(offsets_E.numel())]
    return groups_are_even and size * offsets_E.numel() == order_R.numel()


def rows_times_weights(rows_RM: Tensor, weights_EMN: Tensor, offsets_E: Tensor, batch: bool) -> Tensor:
    """[R, N]: each expert's rows times its matrix. What rows after the last expert's become is undefined."""
    if not batch:
        return F.grouped_mm(rows_RM, weights_EMN, offs=offsets_E)
    used, groups = int(offsets_E[-1]), (offsets_E.numel(), -1)
    y_RN = rows_RM.new_empty(rows_RM.shape[0], weights_EMN.shape[2])
    torch.bmm(rows_RM[:used].unflatten(0, groups), weights_EMN, out=y_RN[:used].unflatten(0, groups))
    return y_RN


def weight_gradient(left_RM: Tensor, right_RN: Tensor, offsets_E: Tensor, batch: bool) -> Tensor:
    """[E, M, N]: the sum over each expert's rows of left (outer) right."""
    if batch:
        groups = (offsets_E.numel(), -1)
        return torch.bmm(left_RM.unflatten(0, groups).transpose(1, 2), right_RN.unflatten(0, groups))
    return F.grouped_mm(left_RM.t(), right_RN, offs=offsets_E)
