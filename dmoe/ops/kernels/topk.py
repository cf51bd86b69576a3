"""The router after its matrix product in one kernel: scores, the K highest, their weights; and the gradient.

Takes fp32 logits to what `router_scores` and `choose_topk` of `dmoe.ops.routing` give, reading the logits and writing
the scores once. The backward needs the scores and the ids, which are outputs, and nothing else. With s the scores, S
the sum of a token's K chosen ones and c the scaling factor, the weights are w_k = c s_k / S, and

    ds_k += c (dw_k - sum_j dw_j s_j / S) / S              (w_k = c s_k without normalisation: ds_k += c dw_k)
    softmax: dl_e = s_e (ds_e - sum_f ds_f s_f)            sigmoid: dl_e = ds_e s_e (1 - s_e)

Legend: T tokens, E experts, K picks a token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dmoe.ops.balancing import MIN_SUM
from dmoe.ops.platform import on_its_device

_ELEMENTS = 512  # logits that a program of one warp holds: 16 a thread
_UNROLL = 4
_TAKEN = tl.constexpr(-(2**31))
_MIN_SUM = tl.constexpr(MIN_SUM)


@triton.jit
def _scores(logits, SOFTMAX: tl.constexpr):
    """Scores of a tile of whole rows. Columns past the last expert hold -inf and get 0."""
    if SOFTMAX:
        powers = tl.exp(logits - tl.max(logits, 1)[:, None])
        return powers / tl.sum(powers, 1)[:, None]
    else:
        return 1.0 / (1.0 + tl.exp(-logits))


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr, scores_ptr, ids_ptr, weights_ptr, num_tokens, num_experts, scaling_factor,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, TOP_K: tl.constexpr,
    K_PAD: tl.constexpr, E_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, E_PAD)
    is_token, is_expert = tokens < num_tokens, experts < num_experts
    where = tokens[:, None] * num_experts + experts[None, :]
    mask = is_token[:, None] & is_expert[None, :]
    # A row that is no token is all zeros: with -inf alone it would make NaN.
    logits = tl.load(logits_ptr + where, mask=mask, other=0.0)
    scores = _scores(tl.where(is_expert[None, :], logits, float("-inf")), SOFTMAX)
    tl.store(scores_ptr + where, scores, mask=mask)

    # Scores are not negative, so their bits order as integers do, and the largest of a row is one integer reduction
    # across a warp. NaN is above all, as in torch.topk; the bits of a column that is taken or is no expert are below
    # all, so ids are valid and distinct whatever the logits.
    bits = tl.where(is_expert[None, :], scores.to(tl.int32, bitcast=True), _TAKEN)
    picks = tl.arange(0, K_PAD)
    ids_TK = tl.zeros([TOKENS, K_PAD], tl.int32)
    weights_TK = tl.zeros([TOKENS, K_PAD], tl.float32)
    for k in range(TOP_K):
        best = tl.max(bits, 1)
        chosen = tl.min(tl.where(bits == best[:, None], experts[None, :], E_PAD), 1)
        bits = tl.where(experts[None, :] == chosen[:, None], _TAKEN, bits)
        ids_TK = tl.where(picks[None, :] == k, chosen[:, None], ids_TK)
        weights_TK = tl.where(picks[None, :] == k, best.to(tl.float32, bitcast=True)[:, None], weights_TK)
    if NORMALIZE:
        weights_TK /= tl.maximum(tl.sum(weights_TK, 1), _MIN_SUM, propagate_nan=tl.PropagateNan.ALL)[:, None]
    where = tokens[:, None] * TOP_K + picks[None, :]
    mask = is_token[:, None] & (picks < TOP_K)[None, :]
    tl.store(ids_ptr + where, ids_TK.to(tl.int64), mask=mask)
    tl.store(weights_ptr + where, weights_TK * scaling_factor, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_backward_kernel(
    grad_scores_ptr, grad_weights_ptr, scores_ptr, ids_ptr, grad_logits_ptr,
    num_tokens, num_experts, scaling_factor, grad_scores_stride_t, grad_scores_stride_e,
    HAS_GRAD_SCORES: tl.constexpr, HAS_GRAD_WEIGHTS: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr, UNROLL: tl.constexpr, E_PAD: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    experts = tl.arange(0, E_PAD)
    is_token = tokens < num_tokens
    where = tokens[:, None] * num_experts + experts[None, :]
    mask = is_token[:, None] & (experts < num_experts)[None, :]
    scores = tl.load(scores_ptr + where, mask=mask, other=0.0)
    grad = tl.zeros([TOKENS, E_PAD], tl.float32)
    if HAS_GRAD_SCORES:
        where_grad = tokens[:, None] * grad_scores_stride_t + experts[None, :] * grad_scores_stride_e
        grad = tl.load(grad_scores_ptr + where_grad, mask=mask, other=0.0)
    if HAS_GRAD_WEIGHTS:
        scale = tl.zeros([TOKENS], tl.float32) + scaling_factor
        mean = tl.zeros([TOKENS], tl.float32)
        if NORMALIZE:
            total = tl.zeros([TOKENS], tl.float32)
            dot = tl.zeros([TOKENS], tl.float32)
            for k in tl.range(0, TOP_K, loop_unroll_factor=UNROLL):
                pick = tokens * TOP_K + k
                expert = tl.load(ids_ptr + pick, mask=is_token, other=0)
                score = tl.load(scores_ptr + tokens * num_experts + expert, mask=is_token, other=0.0)
                total += score
                dot += score * tl.load(grad_weights_ptr + pick, mask=is_token, other=0.0)
            # Below the bound the weights are s_k / bound, and the sum has no part in the gradient.
            divisor = tl.maximum(total, _MIN_SUM, propagate_nan=tl.PropagateNan.ALL)
            mean = tl.where(total < _MIN_SUM, 0.0, dot / divisor)
            scale /= divisor
        for k in tl.range(0, TOP_K, loop_unroll_factor=UNROLL):
            pick = tokens * TOP_K + k
            expert = tl.load(ids_ptr + pick, mask=is_token, other=0)
            value = scale * (tl.load(grad_weights_ptr + pick, mask=is_token, other=0.0) - mean)
            grad += tl.where(experts[None, :] == expert[:, None], value[:, None], 0.0)
    if SOFTMAX:
        grad = scores * (grad - tl.sum(grad * scores, 1)[:, None])
    else:
        grad = grad * scores * (1.0 - scores)
    tl.store(grad_logits_ptr + where, grad, mask=mask)


def _tile(num_experts: int) -> dict[str, int]:
    """A program is one warp with whole rows, so that no reduction goes through shared memory."""
    padded = max(16, triton.next_power_of_2(num_experts))
    return {"E_PAD": padded, "TOKENS": max(1, _ELEMENTS // padded), "num_warps": 1}


@torch.library.custom_op("dmoe::route", mutates_args=())
@on_its_device
def _route(
    logits_TE: Tensor, top_k: int, score_function: str, normalize: bool, scaling_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    logits_TE = logits_TE.contiguous()
    scores_TE = torch.empty_like(logits_TE)
    ids_TK = logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64)
    weights_TK = logits_TE.new_empty(num_tokens, top_k)
    if num_tokens:
        tile = _tile(num_experts)
        _route_kernel[(triton.cdiv(num_tokens, tile["TOKENS"]),)](
            logits_TE, scores_TE, ids_TK, weights_TK, num_tokens, num_experts, scaling_factor,
            SOFTMAX=score_function == "softmax", NORMALIZE=normalize, TOP_K=top_k,
            K_PAD=triton.next_power_of_2(top_k), **tile,
        )  # fmt: skip
    return scores_TE, ids_TK, weights_TK


@_route.register_fake
def _(
    logits_TE: Tensor, top_k: int, score_function: str, normalize: bool, scaling_factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    picks = (logits_TE.shape[0], top_k)
    return (
        logits_TE.new_empty(logits_TE.shape), logits_TE.new_empty(picks, dtype=torch.int64), logits_TE.new_empty(picks),
    )  # fmt: skip


@torch.library.custom_op("dmoe::route_backward", mutates_args=())
@on_its_device
def _route_backward(
    grad_scores_TE: Tensor | None,
    grad_weights_TK: Tensor | None,
    scores_TE: Tensor,
    ids_TK: Tensor,
    score_function: str,
    normalize: bool,
    scaling_factor: float,
) -> Tensor:
    num_tokens, num_experts = scores_TE.shape
    grad_logits_TE = torch.empty_like(scores_TE)
    if num_tokens:
        top_k = ids_TK.shape[1]
        tile = _tile(num_experts)
        # The gradient of a sum over tokens is an expanded row: read through its strides, not copied.
        strides = (0, 0) if grad_scores_TE is None else grad_scores_TE.stride()
        _route_backward_kernel[(triton.cdiv(num_tokens, tile["TOKENS"]),)](
            scores_TE if grad_scores_TE is None else grad_scores_TE,
            scores_TE if grad_weights_TK is None else grad_weights_TK.contiguous(),
            scores_TE, ids_TK, grad_logits_TE, num_tokens, num_experts, scaling_factor, *strides,
            HAS_GRAD_SCORES=grad_scores_TE is not None, HAS_GRAD_WEIGHTS=grad_weights_TK is not None,
            SOFTMAX=score_function == "softmax", NORMALIZE=normalize,
            TOP_K=top_k, UNROLL=min(top_k, _UNROLL), **tile,
        )  # fmt: skip
    return grad_logits_TE


@_route_backward.register_fake
def _(
    grad_scores_TE: Tensor | None,
    grad_weights_TK: Tensor | None,
    scores_TE: Tensor,
    ids_TK: Tensor,
    score_function: str,
    normalize: bool,
    scaling_factor: float,
) -> Tensor:
    return scores_TE.new_empty(scores_TE.shape)


def _differentiable_backward(
    grad_scores_TE: Tensor | None,
    grad_weights_TK: Tensor | None,
    scores_TE: Tensor,
    ids_TK: Tensor,
    score_function: str,
    normalize: bool,
    scaling_factor: float,
) -> Tensor:
    """The same as `_route_backward` in operations that can be differentiated again."""
    grad = torch.zeros_like(scores_TE) if grad_scores_TE is None else grad_scores_TE
    if grad_weights_TK is not None:
        grad_picks = grad_weights_TK * scaling_factor
        if normalize:
            picked = scores_TE.gather(1, ids_TK)
            total = picked.sum(1, keepdim=True)
            mean = (grad_picks * picked).sum(1, keepdim=True) / total.clamp_min(MIN_SUM)
            grad_picks = (grad_picks - mean.where(total >= MIN_SUM, 0.0)) / total.clamp_min(MIN_SUM)
        grad = grad.scatter_add(1, ids_TK, grad_picks)
    if score_function == "softmax":
        return scores_TE * (grad - (grad * scores_TE).sum(1, keepdim=True))
    return grad * scores_TE * (1.0 - scores_TE)


class _Route(torch.autograd.Function):
    """Autograd over the two operators. A Function rather than a formula registered with the operator, because
    `torch.func.grad` and its kin accept only the former."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():  # functorch runs this with gradients enabled
            return _route(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        scores_TE, ids_TK, _ = output
        ctx.save_for_backward(scores_TE, ids_TK)
        ctx.mark_non_differentiable(ids_TK)
        ctx.set_materialize_grads(False)  # without a balancing loss the scores have no gradient
        ctx.options = inputs[2:]

    @staticmethod
    def backward(
        ctx: Any, grad_scores_TE: Tensor | None, _: None, grad_weights_TK: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        args = (grad_scores_TE, grad_weights_TK, *ctx.saved_tensors, *ctx.options)
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()  # a second derivative is wanted
        grad_logits_TE = _differentiable_backward(*args) if again else _route_backward(*args)
        return grad_logits_TE, None, None, None, None


def route_triton(
    logits_TE: Tensor, top_k: int, *, score_function: str, normalize: bool, scaling_factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`router_scores` and `choose_topk` of `dmoe.ops.routing` in one kernel.

    Args:
        logits_TE: fp32.
        top_k: K, from 1 to E. The time grows with K * E.

    Returns:
        scores_TE fp32, topk_ids_TK int64 by falling score (the lower id where scores are equal), topk_weights_TK fp32.

    Raises:
        ValueError: logits that are not fp32, top_k out of range, an unknown score function.
    """
    if logits_TE.dtype != torch.float32:
        raise ValueError(f"logits must be float32, got {logits_TE.dtype}")
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"top_k must be between 1 and the {logits_TE.shape[1]} experts, got {top_k}")
    if score_function not in ("softmax", "sigmoid"):
        raise ValueError(f"unknown score function {score_function!r}")
    args = (logits_TE, top_k, score_function, normalize, float(scaling_factor))
    return _Route.apply(*args) if torch.is_grad_enabled() else _route(*args)
