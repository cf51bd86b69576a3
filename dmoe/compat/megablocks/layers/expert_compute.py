"""The experts' computation for any activation function: `dmoe.ops.expert_mlp` for those it has, else grouped products.

Legend: T tokens, D width, K picks, R = T*K rows grouped by expert, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.compat.megablocks import grouped_gemm_util
from dmoe.compat.megablocks.layers.gelu import gelu
from dmoe.ops import expert_mlp, sort_by_expert
from dmoe.ops.permute import gather_rows, sum_rows
from dmoe.ops.precision import autocast_dtype, autocast_off

Activation = Callable[..., Tensor]

_FUNCTIONS = {F.silu: "silu", F.relu: "relu", torch.relu: "relu", gelu: "gelu_tanh"}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_name(function: Activation) -> str | None:
    """The name in `dmoe.ops.activations` of `F.silu`, `F.relu`, `F.gelu` (exact or tanh, by `functools.partial`),
    `layers.gelu.gelu`, `nn.SiLU()`, `nn.ReLU()` or `nn.GELU()`; None of any other callable."""
    if isinstance(function, partial):
        bare = not function.args and not any(k not in ("approximate", "inplace") for k in function.keywords)
        if bare and function.func is F.gelu:
            return _GELUS.get(function.keywords.get("approximate", "none"))
        return activation_name(function.func) if bare and "approximate" not in function.keywords else None
    if isinstance(function, nn.Module):
        return _module_name(function)
    if function is F.gelu:
        return "gelu"
    return next((name for known, name in _FUNCTIONS.items() if function is known), None)


def _module_name(module: nn.Module) -> str | None:
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.GELU:
        return _GELUS.get(module.approximate)
    return "silu" if type(module) is nn.SiLU else "relu" if type(module) is nn.ReLU else None


def compute_experts(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    activation_fn: Activation,
    *,
    memory_optimized: bool = False,
) -> Tensor:
    """y_t = sum over k of weight[t, k] * act(x_t w1_e^T) w2_e, e = id[t, k]; with v1, act(x_t w1_e^T) * (x_t v1_e^T).

    An activation that `activation_name` knows runs in the fused kernels, which keep x and the first product for the
    backward. Any other is called on rows [R, F] in the dtype of the computation, and autograd keeps what it needs; with
    `memory_optimized` it is recomputed in the backward, with the second product, and the first product is kept alone.

    Args:
        x_TD: [T, D], fp32, bf16, fp16 or (slowly) fp64; under autocast everything is cast.
        topk_ids_TK, topk_weights_TK: as for `dmoe.ops.expert_mlp`.

    Returns:
        [T, D]. Host synchronisation as in `expert_mlp`; with another activation on a GPU, none for bf16 with widths
        that are a multiple of 8, while what else there is loops over experts and reads the group sizes.

    Raises:
        ConfigError: shapes or dtypes do not fit.
    """
    name = activation_name(activation_fn)
    if name is not None:
        gate_up = w1_EFD if v1_EFD is None else torch.cat([w1_EFD, v1_EFD], dim=1)
        return expert_mlp(x_TD, topk_ids_TK, topk_weights_TK, gate_up, w2_EFD.transpose(1, 2), activation=name)
    dtype = autocast_dtype(x_TD)
    x_TD, w1_EFD, w2_EFD = x_TD.to(dtype), w1_EFD.to(dtype), w2_EFD.to(dtype)
    v1_EFD = None if v1_EFD is None else v1_EFD.to(dtype)
    with autocast_off(x_TD):
        return _with_any_activation(
            x_TD, topk_ids_TK, topk_weights_TK, w1_EFD, v1_EFD, w2_EFD, activation_fn, memory_optimized
        )


def compute_rows(
    x_RD: Tensor,
    counts_E: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    activation_fn: Activation,
    *,
    memory_optimized: bool = False,
) -> Tensor:
    """`compute_experts` of rows that are grouped by expert, `counts_E[e]` for expert e, any integers on any device."""
    counts_E = counts_E.to(x_RD.device, torch.int64)
    ids_E = torch.arange(counts_E.numel(), device=x_RD.device)
    ids_R1 = ids_E.repeat_interleave(counts_E, output_size=x_RD.shape[0]).unsqueeze(1)
    ones_R1 = x_RD.new_ones(ids_R1.shape)
    return compute_experts(
        x_RD, ids_R1, ones_R1, w1_EFD, v1_EFD, w2_EFD, activation_fn, memory_optimized=memory_optimized
    )


def _with_any_activation(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w1_EFD: Tensor,
    v1_EFD: Tensor | None,
    w2_EFD: Tensor,
    activation_fn: Activation,
    memory_optimized: bool,
) -> Tensor:
    # A pick of no expert has weight 0: it may as well be of the last one.
    permutation = sort_by_expert(topk_ids_TK.clamp(max=w1_EFD.shape[0] - 1), w1_EFD.shape[0])
    sizes_E = torch.diff(permutation.offsets_E, prepend=permutation.offsets_E.new_zeros(1))
    x_RD = gather_rows(x_TD, permutation)
    weights_R = topk_weights_TK.reshape(-1).index_select(0, permutation.order_R)
    gate_RF = grouped_gemm_util.ops.gmm(x_RD, w1_EFD, sizes_E, trans_b=True)
    up_RF = None if v1_EFD is None else grouped_gemm_util.ops.gmm(x_RD, v1_EFD, sizes_E, trans_b=True)

    def finish(gate_RF: Tensor, up_RF: Tensor | None) -> Tensor:
        a_RF = activation_fn(gate_RF)
        if up_RF is not None:
            a_RF = a_RF * up_RF
        # Once and before the product, as in `expert_mlp`; in the wider of the two dtypes.
        a_RF = (a_RF * weights_R.unsqueeze(1)).to(x_RD.dtype)
        return grouped_gemm_util.ops.gmm(a_RF, w2_EFD, sizes_E)

    if memory_optimized and torch.is_grad_enabled():
        y_RD = checkpoint(finish, gate_RF, up_RF, use_reentrant=False)
    else:
        y_RD = finish(gate_RF, up_RF)
    return sum_rows(y_RD, permutation)
