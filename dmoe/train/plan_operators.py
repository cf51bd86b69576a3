"""What operators allocate on the device of a run, when it is planned on fake tensors of the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dmoe.ops import grouped

# Rows of a block for which the triton backend adds up the gradient of the routing weights.
_WEIGHT_GRADIENT_BLOCK = 64
# The cuBLAS handles of the forward's and the backward's thread have a workspace each: this much on Hopper and later.
CUDA_WORKSPACES = 2 * 32 * 2**20


def operators(device: str, bf16: bool, spread: bool) -> dict[Any, Callable[..., Any]]:
    """Operator -> what to run in its place, for `MemoryTimeline`.

    Args:
        spread: experts are, over ranks, so that gradients of tokens come before those of weights.
    """
    found: dict[Any, Callable[..., Any]] = {
        torch.ops.aten._grouped_mm.default: _grouped_mm,
        torch.ops.dmoe.expert_mlp.default: _expert_mlp,
        torch.ops.dmoe.expert_mlp_backward.default: grouped._expert_mlp_backward._init_fn,
    }
    if device == "cpu":
        return found
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    found[flash] = _flash_attention_backward
    if bf16:  # else the triton backend is not chosen
        found[torch.ops.dmoe.expert_mlp.default] = _triton_forward
        found[torch.ops.dmoe.expert_mlp_backward.default] = partial(_triton_backward, spread)
    return found


@contextlib.contextmanager
def as_on(device: str) -> Iterator[None]:
    """What a GPU computes at once and a CPU in blocks, and norms that a GPU has fused kernels for."""
    if device == "cpu":
        yield
        return
    original = grouped._CPU_BLOCK
    grouped._CPU_BLOCK = 2**62
    try:
        with _FusedNorms():
            yield
    finally:
        grouped._CPU_BLOCK = original


def _expert_mlp(*args: Any) -> Any:
    # Without padding, whose size depends on values.
    return grouped._expert_mlp._init_fn(*args[:9], False, *args[10:])


def _grouped_mm(left: Tensor, right: Tensor, offs: Tensor, *_: Any) -> Tensor:
    """Its shape; torch's own says so for bf16 alone."""
    if right.dim() == 3:
        return left.new_empty(left.shape[0], right.shape[2])
    return left.new_empty(offs.shape[0], left.shape[0], right.shape[1])


def _flash_attention_backward(
    _grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, ...]:
    """The GPU's kernel adds up the gradient of the queries in fp32, and shared keys get one for each query head."""
    batch, heads, length, width = query.shape
    rows, columns = -(-length // 128) * 128, -(-width // 32) * 32
    working = [query.new_empty(batch, heads, rows, columns + 1, dtype=torch.float32)]
    if key.shape[1] != heads:
        working += [t.new_empty(batch, heads, *t.shape[2:]) for t in (key, value)]
    return tuple(torch.empty_like(t) for t in (query, key, value))


def _triton_forward(
    x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, gate_up: Tensor, down: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """What `dmoe.ops.triton_experts` allocates, in its order."""
    _gate_up_bias, _down_bias, _activation, save, _may_resize, *options = rest
    num_rows = options[0] if options else None
    rows, width = topk_ids_TK.numel() if num_rows is None else num_rows, x_TD.shape[1]
    ids = topk_ids_TK
    order_R, inverse_TK = ids.new_empty(rows, dtype=torch.int32), ids.new_empty(ids.shape, dtype=torch.int32)
    offsets_E = ids.new_empty(down.shape[0], dtype=torch.int32)
    scale_R = topk_weights_TK.new_empty(rows)
    h_RH = x_TD.new_empty(rows if save else 0, gate_up.shape[1])
    a_RF, y_RD = x_TD.new_empty(rows, down.shape[2]), x_TD.new_empty(rows, width)
    y_TD = y_RD.new_empty(x_TD.shape)
    del scale_R, a_RF
    return y_TD, h_RH, order_R, inverse_TK, offsets_E


def _triton_backward(
    spread: bool, grad_TD: Tensor, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, gate_up: Tensor,
    down: Tensor, gate_up_bias: Tensor | None, down_bias: Tensor | None, h_RH: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same for its backward; of experts that are `spread` in the order in which gradients travel early."""
    needs, rows, (_, width, expert_width) = rest[-1], h_RH.shape[0], down.shape
    grads = [x_TD.new_empty(0) for _ in needs]
    scale_R = topk_weights_TK.new_empty(rows)
    grad_TD = grad_TD.contiguous()
    grad_RD, grad_h_RH, a_RF = (grad_TD.new_empty(rows, n) for n in (width, h_RH.shape[1], expert_width))
    blocks = -(-expert_width // _WEIGHT_GRADIENT_BLOCK)
    grad_s_R = scale_R.new_empty(blocks, rows).sum(0)
    inputs_first = spread and all(needs[:2]) and any(needs[2:])
    if not inputs_first:
        grads[3] = down.new_empty(down.shape if needs[3] else 0)
        del grad_RD, a_RF
    if needs[0]:
        rows_RD = grad_h_RH.new_empty(rows, width)
        grads[0] = rows_RD.new_empty(x_TD.shape)
        del rows_RD
    if inputs_first:
        grads[3] = down.new_empty(down.shape if needs[3] else 0)
        del grad_RD, a_RF
    if needs[2]:
        spread_RD = x_TD.new_empty(rows, width)
        grads[2] = gate_up.new_empty(gate_up.shape)
        del spread_RD
    if needs[1]:
        grads[1] = grad_s_R.new_empty(topk_ids_TK.shape)
    for i, bias in ((4, gate_up_bias), (5, down_bias)):
        if needs[i] and bias is not None:
            grads[i] = bias.new_empty(bias.shape)
    return tuple(grads)


class _FusedNorms(TorchFunctionMode):
    """`rms_norm` as one node that keeps its input and a number for each row, and not the steps of a formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.rms_norm:
            return _rms_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    return _RMSNorm.apply(input, weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight)
