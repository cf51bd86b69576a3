"""Inference on a CPU with expert weights packed for it: each matrix in the blocked layout that oneDNN's products read.

A product with a plain weight rearranges that weight at every call, which at few rows costs as much as the product. Here
that is done once. Only the packed form is kept, it holds the same numbers (`PackedWeights.unpack` gives back every bit)
and is as large as the plain one, but for widths that are no multiple of 64, which it fills up with zeros.

The operators behind it are private to PyTorch (2.11 to 2.13 have them; the compiler's CPU backend is their user), so
`why_not_packed` tries them before anything depends on them.

Legend: T tokens, D width, K picks, R = T*K rows sorted by expert, E experts, F expert width, H = 2F (gated) or F,
M and N widths of a matrix.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.activations import activate
from dmoe.ops.permute import first_rows, sort_by_expert, sum_picks

# Rows that the layout is chosen for. It fits other numbers of rows as well.
_TYPICAL_ROWS = 64
# Rows per activation block: the fp32 temporaries stay in the cache of a core.
_BLOCK = 2**18


def _pack(weight_NM: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight_NM, _TYPICAL_ROWS)


def _linear(rows_RM: Tensor, packed: Tensor, bias_N: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows_RM, packed, bias_N, "none", [], "")


@functools.lru_cache
def _operators_fail(dtype: torch.dtype) -> str | None:
    """Why the private operators do not work for `dtype` in this PyTorch on this CPU; None if they do."""
    weight, rows = torch.eye(16, dtype=dtype)[:, :8].contiguous(), torch.ones(2, 8, dtype=dtype)
    try:
        packed = _pack(weight)
        works = torch.equal(_linear(rows, packed), rows @ weight.t()) and torch.equal(packed.to_dense(), weight)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
        return f"this PyTorch or CPU does not pack {dtype}: {str(error).splitlines()[0]}"
    return None if works else f"this PyTorch packs {dtype} wrongly"


def why_not_packed(weights_ENM: Tensor) -> str | None:
    """Why these weights cannot be packed, or None if they can."""
    if weights_ENM.device.type != "cpu":
        return f"the weights are on {weights_ENM.device.type!r}, not on the CPU"
    if weights_ENM.dtype not in (torch.float32, torch.bfloat16):
        return f"the weights are {weights_ENM.dtype}: only float32 and bfloat16 are packed"
    return _operators_fail(weights_ENM.dtype)


class PackedWeights:
    """One projection of all experts, [E, N, M], packed. Not differentiable, not to be written to."""

    def __init__(self, weights_ENM: Tensor) -> None:
        """Of a copy of `weights_ENM`, fp32 or bf16 on the CPU; see `why_not_packed`.

        Raises:
            RuntimeError: the weights cannot be packed.
        """
        if reason := why_not_packed(weights_ENM):
            raise RuntimeError(reason)
        self.shape, self.dtype = weights_ENM.shape, weights_ENM.dtype
        with torch.no_grad():
            self.matrices = [_pack(weight.contiguous()) for weight in weights_ENM]

    def unpack(self) -> Tensor:
        """A plain copy, [E, N, M], equal bit by bit to what was packed."""
        weights_ENM = torch.empty(self.shape, dtype=self.dtype)
        for plain, packed in zip(weights_ENM, self.matrices):
            plain.copy_(packed.to_dense())
        return weights_ENM

    def nbytes(self) -> int:
        """Bytes that the packed form takes."""
        return sum(torch.ops.mkldnn._nbytes(matrix) for matrix in self.matrices)

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeights, (self.unpack(),)  # the packed layout belongs to this CPU


def _rows_computed(rows: int) -> int:
    """The number of rows that a product of `rows` rows is computed with: eight different ones an octave, few below 8.

    oneDNN prepares code for every number of rows that it has not seen, for as long as a small product takes.
    """
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    step = max(4, 1 << ((rows - 1).bit_length() - 4))
    return -(-rows // step) * step


class _Groups:
    """The rows of each expert that has any: (expert, first row, number of rows, rows to compute)."""

    def __init__(self, ends: list[int], num_picks: int) -> None:
        self.rows = ends[-1]
        self.groups = [
            (expert, start, end - start, _rows_computed(end - start))
            for expert, (start, end) in enumerate(zip([0, *ends], ends))
            if end > start
        ]
        # A product may run over into rows of the next experts, and its results there are dropped: no row is moved to
        # make room. Only behind the last expert there must be more, and one for picks of no expert.
        beyond = [start + more - self.rows for _, start, _, more in self.groups]
        self.spare = max([int(self.rows < num_picks), *beyond])

    def multiply(self, rows_RM: Tensor, weights: PackedWeights, bias_EN: Tensor | None = None) -> Tensor:
        """[R, N], and `spare` rows of zeros: each expert's rows times its matrix, plus its bias."""
        result_RN = rows_RM.new_empty(self.rows + self.spare, weights.shape[1])
        result_RN[self.rows :].zero_()
        for expert, start, count, more in self.groups:
            bias_N = None if bias_EN is None else bias_EN[expert]
            product = _linear(rows_RM[start : start + more], weights.matrices[expert], bias_N)
            result_RN[start : start + count] = product[:count]
        return result_RN


def _activate(h_RH: Tensor, scale_R1: Tensor, activation: str, gated: bool) -> Tensor:
    """The activation of each row times its routing weight, multiplied in fp32 and rounded once."""
    a_RF = h_RH.new_empty(h_RH.shape[0], h_RH.shape[1] // 2 if gated else h_RH.shape[1])
    step = max(512, _BLOCK // h_RH.shape[1])
    for start in range(0, h_RH.shape[0], step):
        block = slice(start, start + step)
        torch.mul(activate(h_RH[block], activation, gated=gated), scale_R1[block], out=a_RF[block])
    return a_RF


@torch.no_grad()
def expert_mlp_packed(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: PackedWeights,
    down_proj: PackedWeights,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
) -> Tensor:
    """`dmoe.ops.expert_mlp` with packed weights. Not differentiable; arguments are not checked.

    Args:
        x_TD: [T, D] in the dtype of the weights, on the CPU.
        gate_up_proj, down_proj: [E, H, D] and [E, D, F].
        topk_ids_TK, topk_weights_TK, gate_up_bias, down_bias, activation: as for `expert_mlp`.

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    top_k, gated = topk_ids_TK.shape[1], gate_up_proj.shape[1] == 2 * down_proj.shape[2]
    permutation = sort_by_expert(topk_ids_TK, gate_up_proj.shape[0])
    groups = _Groups(permutation.offsets_E.tolist(), topk_ids_TK.numel())
    order_R, inverse_TK, _ = first_rows(permutation, groups.rows)
    # The spare rows are copies of token 0 with weight 0; their results are zeros.
    scale_R1 = F.pad(topk_weights_TK.reshape(-1).float()[order_R], (0, groups.spare)).unsqueeze(1)
    x_RD = x_TD.index_select(0, F.pad(order_R // top_k, (0, groups.spare)))

    h_RH = groups.multiply(x_RD, gate_up_proj, gate_up_bias)
    y_RD = groups.multiply(_activate(h_RH, scale_R1, activation, gated), down_proj)
    if down_bias is not None:
        experts_R = topk_ids_TK.reshape(-1)[order_R]
        y_RD[: groups.rows] += (down_bias.index_select(0, experts_R) * scale_R1[: groups.rows]).to(y_RD.dtype)
    return sum_picks(y_RD, inverse_TK)
