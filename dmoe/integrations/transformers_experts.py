"""The experts modules of transformers, computed by `expert_mlp` where it has their activation, else by their own code
between grouped matrix products.

An experts module, `@use_experts_implementation` in transformers, has fused weights and says in flags how they lie:

    gate_up_proj [E, 2F, D] (up_proj [E, F, D] without `has_gate`) and down_proj [E, D, F]; with `is_transposed` the
    last two dims of both change places; with `has_bias` gate_up_proj_bias (or up_proj_bias) and down_proj_bias

and turns the 2F columns into F by its method `_apply_gate`. Legend: T tokens, D width, K picks, R = T*K rows,
E experts, F expert width, M and N widths of a product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.ops.activations import ACTIVATIONS, activate
from dmoe.ops.expert_mlp import expert_mlp
from dmoe.ops.permute import Permutation, gather_rows, sort_by_expert, sum_rows
from dmoe.ops.platform import on_its_device
from dmoe.ops.precision import autocast_dtype, in_autocast
from dmoe.ops.products import rows_times_weights, weight_gradient

# `expert_mlp` wants weights as [E, 2F, D], gate before up. Others are copied in that order at each call, which pays
# from about so many rows an expert on: with fewer, moving the weights takes longer than what the fused path saves.
ROWS_WORTH_A_COPY = 512


class Form(NamedTuple):
    """How `expert_mlp` expresses a module's activation."""

    activation: str
    interleaved: bool
    """Columns are gate, up, gate, up, ... and not all gates first."""


def experts_forward(module: Any, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """[T, D] in the dtype of `x_TD`: the experts of `module`. Ids from E on are picks of no expert."""
    num_experts = module.down_proj.shape[0]
    has_sentinels = getattr(module, "_is_expert_parallel", True)
    if has_sentinels:
        topk_ids_TK = topk_ids_TK.clamp(max=num_experts)
    dtype = autocast_dtype(x_TD) if in_autocast(x_TD) else module.down_proj.dtype
    form = module.__dict__.get("_dmoe_form", "unknown")
    form = form_of(module) if form == "unknown" else form
    copies = bool(module.is_transposed or (form is not None and form.interleaved))
    if form is None or (copies and topk_ids_TK.numel() < ROWS_WORTH_A_COPY * num_experts):
        y_TD = _composed(module, x_TD.to(dtype), topk_ids_TK, topk_weights_TK, has_sentinels)
    else:
        up, down, up_bias, down_bias = _weights(module)
        up = _rows_gate_then_up(up, module.is_transposed, form.interleaved)
        up_bias = None if up_bias is None else _rows_gate_then_up(up_bias, False, form.interleaved)
        down = down.transpose(1, 2) if module.is_transposed else down
        y_TD = expert_mlp(
            x_TD.to(dtype), topk_ids_TK, topk_weights_TK, up, down, up_bias, down_bias, activation=form.activation
        )
    return y_TD.to(x_TD.dtype)


def _weights(module: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    biases = (getattr(module, f"{up}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
    return getattr(module, up), module.down_proj, *biases


def _rows_gate_then_up(up: Tensor, is_transposed: bool, interleaved: bool) -> Tensor:
    """[E, 2F, D] from a weight, [E, 2F] from a bias; a view where the layout allows."""
    up = up.transpose(1, 2) if is_transposed else up
    return up.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2) if interleaved else up


@torch.compiler.assume_constant_result
def form_of(module: Any) -> Form | None:
    """Which activation of ours equals the module's, found by trying it; None: none does. Looked at once.

    If the compiler has to look, its code is for this one module; layers share it if `form_of` was called before.
    """
    if "_dmoe_form" not in module.__dict__:
        module.__dict__["_dmoe_form"] = find_form(module)
    return module.__dict__["_dmoe_form"]


def find_form(module: Any) -> Form | None:
    """Try the module's activation on numbers from -100 to 100, which tell apart all that models use: exact and
    approximated GELU by 1e-4 times up, a clamp by where it begins."""
    act_fn = getattr(module, "act_fn", None)
    learned = isinstance(act_fn, nn.Module) and next(act_fn.parameters(), None) is not None
    if getattr(module, "has_post_expert_norm", False) or learned:
        return None
    numbers = torch.linspace(-4, 4, 33, dtype=torch.float64, device="cpu")
    numbers = torch.cat([numbers, numbers * 3, numbers * 25])
    if not module.has_gate:
        return _match(module.act_fn, numbers.view(9, -1), gated=False, interleaved=False)
    gate, up = (t.reshape(-1, 9) for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    return _match(module._apply_gate, torch.cat([gate, up], dim=1), gated=True, interleaved=False) or _match(
        module._apply_gate, torch.stack([gate, up], dim=2).flatten(1), gated=True, interleaved=True
    )


@torch.no_grad()
def _match(function: Any, h: Tensor, *, gated: bool, interleaved: bool) -> Form | None:
    ordered = torch.cat([h[:, ::2], h[:, 1::2]], dim=1) if interleaved else h
    try:
        theirs = function(h)
        if not isinstance(theirs, Tensor):
            return None
        for name in ACTIVATIONS:
            if name == "clamped_swiglu" and not gated:
                continue
            ours = activate(ordered, name, gated=gated)
            if theirs.shape == ours.shape and torch.allclose(theirs.double(), ours, rtol=1e-5, atol=1e-4):
                return Form(name, interleaved)
    except Exception:  # a function for one width, device or dtype; the module's own shapes will do
        return None
    return None


def _composed(module: Any, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, has_sentinels: bool) -> Tensor:
    """The module's own activation and norm between two products of rows sorted by expert. Weights are used where and
    as they lie. Unlike in `expert_mlp`, autograd keeps what each step makes of the rows."""
    up, down, up_bias, down_bias = (None if t is None else t.to(x_TD.dtype) for t in _weights(module))
    assert up is not None
    assert down is not None
    order_R, _, offsets_E = sort_by_expert(topk_ids_TK, down.shape[0])
    rows = torch.arange(order_R.numel(), device=order_R.device)
    # Picks of no expert have rows too, after all others: nothing has to be counted on the host.
    inverse_TK = torch.empty_like(order_R).scatter_(0, order_R, rows).view(topk_ids_TK.shape)
    permutation = Permutation(order_R, inverse_TK, offsets_E)
    experts_R = topk_ids_TK.flatten()[order_R].clamp(max=down.shape[0] - 1)

    h_RH = _grouped_linear(gather_rows(x_TD, permutation), up, offsets_E, module.is_transposed, has_sentinels)
    h_RH = h_RH if up_bias is None else h_RH + up_bias[experts_R]
    a_RF = module._apply_gate(h_RH) if module.has_gate else module.act_fn(h_RH)
    y_RD = _grouped_linear(a_RF.to(x_TD.dtype), down, offsets_E, module.is_transposed, has_sentinels)
    y_RD = y_RD if down_bias is None else y_RD + down_bias[experts_R]
    if getattr(module, "has_post_expert_norm", False):
        y_RD = module.post_expert_norm(y_RD)
    weights_R1 = topk_weights_TK.flatten()[order_R].unsqueeze(1)
    if has_sentinels:  # a bias or a norm makes something of nothing, and any weight may stand there
        nobody_R1 = (rows >= offsets_E[-1]).unsqueeze(1)
        y_RD, weights_R1 = y_RD.masked_fill(nobody_R1, 0), weights_R1.masked_fill(nobody_R1, 0)
    return sum_rows((y_RD * weights_R1).to(x_TD.dtype), permutation)


def _grouped_linear(
    rows_RM: Tensor, weights: Tensor, offsets_E: Tensor, is_transposed: bool, has_sentinels: bool
) -> Tensor:
    return torch.ops.dmoe.grouped_linear(rows_RM.contiguous(), weights, offsets_E, is_transposed, has_sentinels)


@torch.library.custom_op("dmoe::grouped_linear", mutates_args=())
@on_its_device
def grouped_linear(
    rows_RM: Tensor, weights: Tensor, offsets_E: Tensor, is_transposed: bool, has_sentinels: bool
) -> Tensor:
    """[R, N]: each expert's rows times its matrix.

    Args:
        rows_RM: sorted by expert; expert e has those before offsets_E[e].
        weights: [E, N, M], or [E, M, N] with `is_transposed`; as they are, also in gradients.
        offsets_E: int32.
        has_sentinels: there may be rows after the last expert's. They come out as 0 and get the gradient 0, whatever
            they hold.
    """
    weights_EMN = weights if is_transposed else weights.transpose(1, 2)
    if rows_RM.dtype == torch.float64:  # for which there are no products by groups
        y_RN = rows_RM.new_zeros(rows_RM.shape[0], weights_EMN.shape[2])
        for e, rows in enumerate(_slices(offsets_E)):
            y_RN[rows] = rows_RM[rows] @ weights_EMN[e]
        return y_RN
    rows_RM = _pad(rows_RM, -1)
    if rows_RM.shape[1] != weights_EMN.shape[1] or _pad_width(weights_EMN, -1):
        weights_EMN = _pad(_pad(weights_EMN, -1), -2)
    y_RN = rows_times_weights(rows_RM, weights_EMN, offsets_E, batch=False)
    if has_sentinels:
        nobody_R = torch.arange(y_RN.shape[0], device=y_RN.device) >= offsets_E[-1]
        y_RN.masked_fill_(nobody_R.unsqueeze(1), 0)
    return y_RN[:, : weights.shape[2 if is_transposed else 1]].contiguous()


@grouped_linear.register_fake
def _(rows_RM: Tensor, weights: Tensor, offsets_E: Tensor, is_transposed: bool, has_sentinels: bool) -> Tensor:
    return rows_RM.new_empty(rows_RM.shape[0], weights.shape[2 if is_transposed else 1])


@torch.library.custom_op("dmoe::grouped_linear_weight_gradient", mutates_args=())
@on_its_device
def _gradient_of_weights(grad_RN: Tensor, rows_RM: Tensor, offsets_E: Tensor, is_transposed: bool) -> Tensor:
    left, right = (rows_RM, grad_RN) if is_transposed else (grad_RN, rows_RM)
    if rows_RM.dtype == torch.float64:
        return torch.stack([left[rows].t() @ right[rows] for rows in _slices(offsets_E)])
    wanted = left.shape[1], right.shape[1]
    gradient = weight_gradient(_pad(left, -1), _pad(right, -1), offsets_E, batch=False)
    return gradient[:, : wanted[0], : wanted[1]].contiguous()


@_gradient_of_weights.register_fake
def _(grad_RN: Tensor, rows_RM: Tensor, offsets_E: Tensor, is_transposed: bool) -> Tensor:
    left, right = (rows_RM, grad_RN) if is_transposed else (grad_RN, rows_RM)
    return left.new_empty(offsets_E.numel(), left.shape[1], right.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RM, weights, offsets_E, ctx.is_transposed, ctx.has_sentinels = inputs
    # The rows are needed for the gradient of the weights alone.
    ctx.save_for_backward(rows_RM if weights.requires_grad else None, weights, offsets_E)


def _backward(ctx: Any, grad_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    rows_RM, weights, offsets_E = ctx.saved_tensors
    grad_RN = grad_RN.contiguous()
    of_rows = of_weights = None
    if ctx.needs_input_grad[0]:
        of_rows = grouped_linear(grad_RN, weights, offsets_E, not ctx.is_transposed, ctx.has_sentinels)
    if ctx.needs_input_grad[1]:
        of_weights = _gradient_of_weights(grad_RN, rows_RM, offsets_E, ctx.is_transposed)
    return of_rows, of_weights, None, None, None


grouped_linear.register_autograd(_backward, setup_context=_setup_context)


def _slices(offsets_E: Tensor) -> list[slice]:
    ends = offsets_E.tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


def _pad_width(t: Tensor, dim: int) -> int:
    """Elements that a dim lacks to be a multiple of 16 bytes, which the products want."""
    return -t.shape[dim] % (16 // t.element_size())


def _pad(t: Tensor, dim: int) -> Tensor:
    extra = _pad_width(t, dim)
    return t if extra == 0 else F.pad(t, [0, 0] * (-1 - dim) + [0, extra])
