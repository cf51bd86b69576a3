"""Sinkhorn's normalisation of router logits: scores under which every expert has the same load.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.config import require
from dmoe.ops.collectives import finish_all_reduce, start_all_reduce


@torch.no_grad()
def sinkhorn(
    logits_TE: Tensor,
    *,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
    valid_T: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """r_t * exp(logit_te) * c_e, with r and c such that rows sum to 1 / T and columns to 1 / E. No gradient.

    Rows and columns are normalised in turn, starting from c = 1, until the mean over experts of |change of c| is at
    most `tolerance`; so columns sum to 1 / E and rows to 1 / T up to what that leaves (Clark et al., "Unified scaling
    laws for routed language models", arXiv:2202.01169, appendix; the stop test is Megatron-core's). Computed in fp64.

    The stop test is read on the host at every iteration: this waits for the device and does not fit a CUDA graph or a
    compiled graph.

    Args:
        max_iterations: at least 1; stops there if the tolerance is not met.
        valid_T: bool, False for padding, whose rows take no part, whatever they hold, and come out as 0. None: no
            padding.
        group: ranks whose tokens are one batch. Column sums, T and the stop test are those of all of them, and the
            result is the rows of this rank of what one process would compute. Every rank must call, also without a
            token.

    Returns:
        fp32 [T, E]. Choose the K highest of each row.

    Raises:
        ConfigError: max_iterations is less than 1.
    """
    require(max_iterations >= 1, "max_iterations", max_iterations, "at least 1")
    num_tokens, num_experts = logits_TE.shape
    logits_TE = logits_TE.double()
    if valid_T is not None:
        logits_TE = logits_TE.masked_fill(~valid_T.unsqueeze(1), 0.0)
    if num_tokens:
        # A factor for a row changes its r alone, and this one keeps exp from overflowing.
        logits_TE = logits_TE - logits_TE.amax(dim=1, keepdim=True)
    powers_TE = logits_TE.exp()
    columns_E = powers_TE.new_ones(num_experts)
    tokens_1 = powers_TE.new_full((1,), num_tokens) if valid_T is None else valid_T.sum(dim=0, keepdim=True).double()
    for _ in range(max_iterations):
        rows_T = 1.0 / (powers_TE @ columns_E)  # times 1 / T, which is applied to their sums
        if valid_T is not None:
            rows_T = rows_T * valid_T
        sums = torch.cat([rows_T @ powers_TE, tokens_1])
        if group is not None:
            sums = finish_all_reduce(start_all_reduce(sums, group))
        # The bounds are for a batch without tokens, and for an expert whose logits are all -inf: it keeps its zeros.
        sums_E, all_tokens = sums[:-1].clamp_min(1e-300), sums[-1].clamp_min(1.0)
        before_E, columns_E = columns_E, all_tokens / (num_experts * sums_E)
        if (columns_E - before_E).abs().mean() <= tolerance:
            break
    return (rows_T.unsqueeze(1) * powers_TE * columns_E / all_tokens).float()
