"""The expert MLP with low-rank terms beside its two frozen projections, as one function with a hand-written backward.

Two ways were open. Effective weights W + scale * B A, made at every forward, would let `dmoe.ops.expert_mlp` do the
rest; but they are kept for the backward, so all layers together take the experts' memory a second time, and their
gradients, which nobody wants, are computed as large. Here the products of rank r run beside those of the frozen weights
on rows sorted by expert: what is added to memory is R * r elements a projection, and no weight gradient of W is made.

Legend: T tokens, D width, K picks, R = T*K rows sorted by expert, S = R + 1, E experts, F expert width, H = 2F (gated)
or F, r rank. W1 [E, H, D], W2 [E, D, F] frozen; A1 [E, r, D], B1 [E, H, r], A2 [E, r, F], B2 [E, D, r] trained; c the
scale, w the routing weight.

    forward    u = A1 x        h = W1 x + c B1 u     a = w act(h)        v = A2 a      y = W2 a + c B2 v
    backward   dv = c B2^T dy  da = W2^T dy + A2^T dv                    dw = <da, act(h)>
               dh = w da act'(h)                     du = c B1^T dh      dx = W1^T dh + A1^T du
               dB2 = dy (c v)^T   dA2 = dv a^T       dB1 = dh (c u)^T    dA1 = du x^T

The formulas are those of LoRA (Hu et al., arXiv:2106.09685, section 4.1), for each expert's rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.ops.activations import activate, activate_backward
from dmoe.ops.grouped import row_biases, row_blocks, row_metadata
from dmoe.ops.permute import first_rows, sort_by_expert, sum_picks
from dmoe.ops.precision import autocast_dtype, autocast_off
from dmoe.ops.products import is_batch, permute_rows, rows_times_weights, weight_gradient


class ExpertAdapters(NamedTuple):
    """The low-rank factors of one layer's experts."""

    up_A: Tensor
    """[E, r, D]"""
    up_B: Tensor
    """[E, H, r]"""
    down_A: Tensor
    """[E, r, F]"""
    down_B: Tensor
    """[E, D, r]"""


def lora_expert_mlp(
    x_TD: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    adapters: ExpertAdapters,
    *,
    scale: float,
    activation: str = "silu",
) -> Tensor:
    """`dmoe.ops.expert_mlp` with W + scale * B A in place of each projection W. [T, D] in the dtype of `x_TD`.

    Differentiable in x, the routing weights and the four factors; the projections and biases are constants. With B = 0
    the result is that of backend "torch" bit for bit. Arguments are as for `expert_mlp`, whose ids of no expert, dtypes
    and autocast hold here too. No host synchronisation on a GPU in bf16, unless a width is no multiple of 16 bytes: the
    products then go through a loop over experts, as in fp64.
    """
    dtype = autocast_dtype(x_TD)
    multiple = max(1, 16 // dtype.itemsize)
    extra = -adapters.up_A.shape[1] % multiple  # a kernel for rows of 16 bytes wants the rank to be a multiple
    if extra:
        up_A, up_B, down_A, down_B = adapters
        pad_rows, pad_columns = (0, 0, 0, extra), (0, extra)
        adapters = ExpertAdapters(
            F.pad(up_A, pad_rows), F.pad(up_B, pad_columns), F.pad(down_A, pad_rows), F.pad(down_B, pad_columns)
        )
    biases = (None if t is None else t.detach().to(dtype) for t in (gate_up_bias, down_bias))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    may_resize = x_TD.device.type == "cpu" and not torch.compiler.is_compiling()
    with autocast_off(x_TD):
        y_TD, *_ = _LoRAExpertMLP.apply(
            x_TD.to(dtype).contiguous(), topk_ids_TK.contiguous(), topk_weights_TK.to(wide).contiguous(),
            gate_up_proj.detach().to(dtype), down_proj.detach().to(dtype), *biases,
            *(t.to(dtype).contiguous() for t in adapters), scale, activation, may_resize,
        )  # fmt: skip
    return y_TD


@torch.library.custom_op("dmoe::lora_expert_mlp", mutates_args=())
def _forward(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w1: Tensor, w2: Tensor, bias1: Tensor | None,
    bias2: Tensor | None, up_A: Tensor, up_B: Tensor, down_A: Tensor, down_B: Tensor, scale: float, activation: str,
    may_resize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y_TD and, for the backward: h_RH, u_Rr, v_Sr and the three parts of the permutation.

    `may_resize` lets the number of rows depend on the routing: on the CPU and outside the compiler.
    """
    permutation = _permute(ids_TK, w1, may_resize)
    times = _Products(x_TD, (w1, w2), *permutation)
    tokens_R, experts_R, weight_R1 = row_metadata(permutation[0], ids_TK, weights_TK)
    x_RD = x_TD.index_select(0, tokens_R)
    u_Rr = times.weights(x_RD, up_A.transpose(1, 2))
    h_RH = times.weights(x_RD, w1.transpose(1, 2))
    h_RH.add_(times.weights(u_Rr, up_B.transpose(1, 2)), alpha=scale)
    if bias1 is not None:
        h_RH += row_biases(bias1, experts_R)
    a_SF = x_TD.new_empty(h_RH.shape[0] + 1, w2.shape[2])
    for block in row_blocks(h_RH):
        torch.mul(activate(h_RH[block], activation, gated=_gated(w1, w2)), weight_R1[block], out=a_SF[:-1][block])
    v_Sr = times.weights(a_SF, down_A.transpose(1, 2))
    y_SD = times.weights(a_SF, w2.transpose(1, 2))
    y_SD.add_(times.weights(v_Sr, down_B.transpose(1, 2)), alpha=scale)
    if bias2 is not None:
        y_SD[:-1] += (row_biases(bias2, experts_R) * weight_R1).to(y_SD.dtype)
    y_SD[-1].zero_()
    return sum_picks(y_SD, permutation[1]), h_RH, u_Rr, v_Sr, *permutation


@_forward.register_fake
def _(x_TD: Tensor, ids_TK: Tensor, _weights: Tensor, w1: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows, rank = ids_TK.numel(), rest[3].shape[1]
    return (
        x_TD.new_empty(x_TD.shape), x_TD.new_empty(rows, w1.shape[1]), x_TD.new_empty(rows, rank),
        x_TD.new_empty(rows + 1, rank), ids_TK.new_empty(rows, dtype=torch.int64),
        ids_TK.new_empty(ids_TK.shape, dtype=torch.int64), ids_TK.new_empty(w1.shape[0], dtype=torch.int32),
    )  # fmt: skip


@torch.library.custom_op("dmoe::lora_expert_mlp_backward", mutates_args=())
def _backward(
    grad_TD: Tensor, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w1: Tensor, w2: Tensor, bias2: Tensor | None,
    up_A: Tensor, up_B: Tensor, down_A: Tensor, down_B: Tensor, h_RH: Tensor, u_Rr: Tensor, v_Sr: Tensor,
    order_R: Tensor, inverse_TK: Tensor, offsets_E: Tensor, scale: float, activation: str, needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (empty unless `needs_x`), the routing weights, up_A, up_B, down_A and down_B."""
    times = _Products(x_TD, (w1, w2), order_R, inverse_TK, offsets_E)
    tokens_R, experts_R, weight_R1 = row_metadata(order_R, ids_TK, weights_TK)
    grad_RD = grad_TD.index_select(0, tokens_R)
    grad_v_Rr = times.weights(grad_RD, down_B) * scale
    grad_a_RF = times.weights(grad_RD, w2)
    grad_a_RF += times.weights(grad_v_Rr, down_A)
    grad_h_SH = h_RH.new_empty(h_RH.shape[0] + 1, h_RH.shape[1])
    grad_h_RH = grad_h_SH[:-1]
    grad_w_R = weight_R1.new_empty(weight_R1.shape[0])
    a_RF = torch.empty_like(grad_a_RF)
    for block in row_blocks(h_RH):
        g_RF, w_R1 = grad_a_RF[block].to(weight_R1.dtype), weight_R1[block]
        a = activate_backward(g_RF * w_R1, h_RH[block], activation, gated=_gated(w1, w2), out=grad_h_RH[block])
        torch.sum(g_RF.mul_(a), dim=1, out=grad_w_R[block])
        torch.mul(a, w_R1, out=a_RF[block])
    grad_down_A = times.rows(grad_v_Rr, a_RF)
    grad_down_B = times.rows(grad_RD, v_Sr[:-1] * scale)
    if bias2 is not None:
        grad_w_R += (grad_RD * row_biases(bias2, experts_R)).sum(dim=1, dtype=grad_w_R.dtype)
    grad_weights = F.pad(grad_w_R, (0, 1))[inverse_TK]  # a pick of no expert has the row after the last
    grad_u_Sr = times.weights(grad_h_SH, up_B) * scale
    grad_up_A = times.rows(grad_u_Sr[:-1], x_TD.index_select(0, tokens_R))
    grad_up_B = times.rows(grad_h_RH, u_Rr * scale)
    grad_x = x_TD.new_empty(0)
    if needs_x:
        dx_SD = times.weights(grad_h_SH, w1)
        dx_SD += times.weights(grad_u_Sr, up_A)
        dx_SD[-1].zero_()
        grad_x = sum_picks(dx_SD, inverse_TK)
    return grad_x, grad_weights, grad_up_A, grad_up_B, grad_down_A, grad_down_B


@_backward.register_fake
def _(_grad: Tensor, x_TD: Tensor, _ids: Tensor, weights_TK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    factors, needs_x = rest[3:7], rest[-1]
    grad_x = x_TD.new_empty(x_TD.shape if needs_x else 0)
    return grad_x, weights_TK.new_empty(weights_TK.shape), *(t.new_empty(t.shape) for t in factors)


class _LoRAExpertMLP(torch.autograd.Function):
    """(x, ids, weights, w1, w2, bias1, bias2, up_A, up_B, down_A, down_B, scale, activation, may_resize)."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.dmoe.lora_expert_mlp.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tensors = (*inputs[:5], *inputs[6:11])
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.scale, ctx.activation = inputs[11:13]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_TD is None:
            return (None,) * 14
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_weights, *factors = torch.ops.dmoe.lora_expert_mlp_backward.default(
            grad_TD, *ctx.saved_tensors, ctx.scale, ctx.activation, needs_x
        )
        return grad_x if needs_x else None, None, grad_weights, *(None,) * 4, *factors, None, None, None


def _gated(w1: Tensor, w2: Tensor) -> bool:
    return w1.shape[1] == 2 * w2.shape[2]


def _permute(ids_TK: Tensor, w1: Tensor, may_resize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As backend "torch": on the CPU without rows of no expert, and padded in half precision."""
    if w1.dtype != torch.float64:
        return permute_rows(ids_TK, w1, may_resize)
    permutation = sort_by_expert(ids_TK, w1.shape[0])
    return first_rows(permutation, int(permutation.offsets_E[-1])) if may_resize else permutation


class _Products:
    """Products of the rows of one permutation with a matrix for each expert."""

    def __init__(
        self, x_TD: Tensor, frozen: tuple[Tensor, Tensor], order_R: Tensor, inverse_TK: Tensor, offsets_E: Tensor
    ) -> None:
        self.offsets_E = offsets_E
        widths = {size for weight in frozen for size in weight.shape[1:]}
        aligned = all(width * x_TD.element_size() % 16 == 0 for width in widths)
        self.by_groups = x_TD.dtype != torch.float64 and aligned
        self.batch = self.by_groups and is_batch(x_TD, order_R, inverse_TK, offsets_E)

    def weights(self, rows_RM: Tensor, weights_EMN: Tensor) -> Tensor:
        """[R, N]: each expert's rows times its matrix. What rows after the last expert's become is undefined."""
        if self.by_groups:
            return rows_times_weights(rows_RM, weights_EMN, self.offsets_E, self.batch)
        result_RN = rows_RM.new_zeros(rows_RM.shape[0], weights_EMN.shape[2])
        for rows, weight in zip(self._groups(), weights_EMN):
            torch.mm(rows_RM[rows], weight, out=result_RN[rows])
        return result_RN

    def rows(self, left_RM: Tensor, right_RN: Tensor) -> Tensor:
        """[E, M, N]: the sum over each expert's rows of left (outer) right."""
        if self.by_groups:
            return weight_gradient(left_RM, right_RN, self.offsets_E, self.batch)
        return torch.stack([left_RM[rows].t() @ right_RN[rows] for rows in self._groups()])

    def _groups(self) -> list[slice]:
        ends = self.offsets_E.tolist()
        return [slice(start, end) for start, end in zip([0, *ends], ends)]
