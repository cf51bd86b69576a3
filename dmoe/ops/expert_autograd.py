"""Autograd over a backend's forward and backward operators, and what these have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dmoe.ops.early import receiver_of_inputs
from dmoe.ops.regions import region

Operator = Callable[..., tuple[Tensor, ...]]


def expert_function(
    forward_op: Operator, backward_op: Operator, name: str, inputs_first: Operator | None = None
) -> type[torch.autograd.Function]:
    """A differentiable function of (x, ids, weights, gate_up, down, gate_up_bias, down_bias, activation, *options).

    A Function rather than a formula registered with the operator, because `torch.func.grad` and its kin accept only
    the former.

    Args:
        forward_op: an overload (`torch.ops.dmoe.NAME.default`), which is what the compiler can take from a closure;
            takes those arguments and returns y and whatever the backward needs.
        backward_op: takes dy, the seven tensors, what the forward returned beside y, the activation, and of which
            inputs a gradient is wanted (all but the ids, in order); returns those gradients.
        name: what to call it in the error of a second derivative, as `backend "torch"`.
        inputs_first: as `backward_op`, after an argument that it calls with the gradients of x and weights as soon as
            it has them; for experts called inside `dmoe.ops.early.inputs_first`.
    """

    class Backward(torch.autograd.Function):
        """A node of its own, so that a second derivative is an error and not silently zero."""

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return backward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Any) -> tuple[Tensor | None, ...]:
            raise RuntimeError(f'expert_mlp: {name} is not differentiable twice: use backend="reference"')

    class ExpertMLP(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, ...]:
            with torch.no_grad():  # functorch runs this with gradients enabled
                return forward_op(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            tensors, activation = inputs[:7], inputs[7]
            ctx.save_for_backward(*tensors, *output[1:])
            ctx.mark_non_differentiable(*output[1:])
            ctx.set_materialize_grads(False)  # else zeros as large as what is kept, for gradients that nobody asks for
            ctx.activation, ctx.num_options = activation, len(inputs) - 8
            ctx.receiver = receiver_of_inputs()

        @staticmethod
        def backward(ctx: Any, grad_TD: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            if grad_TD is None:
                return (None,) * (8 + ctx.num_options)
            wanted = [ctx.needs_input_grad[i] for i in (0, 2, 3, 4, 5, 6)]
            args = (grad_TD, *ctx.saved_tensors, ctx.activation, wanted)
            # The compiler cannot trace a Function inside a backward, and refuses second derivatives by itself.
            with region("experts"):
                if torch.compiler.is_compiling():
                    grads = backward_op(*args)
                elif inputs_first is not None and ctx.receiver is not None and _goes_on(ctx, wanted):
                    grads = inputs_first(ctx.receiver, *args)
                else:
                    grads = Backward.apply(*args)
            dx, *others = (g if w else None for g, w in zip(grads, wanted))
            return dx, None, *others, None, *([None] * ctx.num_options)

    return ExpertMLP


def _goes_on(ctx: Any, wanted: list[bool]) -> bool:
    """Whether gradients of x and of routing weights go on from here, and those of experts' weights come meanwhile. A
    pipeline that splits the backward comes here a second time, for the latter alone."""
    if torch.is_grad_enabled() or not (all(wanted[:2]) and any(wanted[2:])):
        return False
    return bool(torch._C._will_engine_execute_node(ctx.next_functions[0][0]))


def grad_weights_of_picks(
    grad_s_R: Tensor, inverse_TK: Tensor, topk_ids_TK: Tensor, grad_TD: Tensor, down_bias: Tensor | None
) -> Tensor:
    """[T, K]: the gradient of the routing weights from that of each row, to which `down_bias` adds its part."""
    grad_TK = F.pad(grad_s_R, (0, 1))[inverse_TK]  # a pick of no expert has the row after the last
    if down_bias is not None:
        # The bias of an expert times the gradient of a token, for the experts that the token chose.
        ids_TK = topk_ids_TK.long()
        products_TE = grad_TD.float() @ down_bias.float().t()
        grad_TK += products_TE.gather(1, ids_TK.clamp(max=down_bias.shape[0] - 1))
        grad_TK.masked_fill_(ids_TK >= down_bias.shape[0], 0)
    return grad_TK


def fake_forward(index_dtype: torch.dtype) -> Operator:
    """Shapes of what a forward operator returns: y_TD, h_RH, and the permutation with indices of that dtype.

    An option after `save` that is a number is that of the rows; a flag is not looked at.
    """

    def fake(
        x_TD: Tensor, topk_ids_TK: Tensor, _weights: Tensor, gate_up_proj: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        _down, _gate_up_bias, _down_bias, _activation, save, *options = rest
        rows = topk_ids_TK.numel()
        rows = next((n for n in options if n is not None and not isinstance(n, bool)), rows)
        return (
            x_TD.new_empty(x_TD.shape),
            x_TD.new_empty(rows if save else 0, gate_up_proj.shape[1]),
            topk_ids_TK.new_empty(rows, dtype=index_dtype),
            topk_ids_TK.new_empty(topk_ids_TK.shape, dtype=index_dtype),
            topk_ids_TK.new_empty(gate_up_proj.shape[0], dtype=torch.int32),
        )

    return fake


def fake_backward(_grad: Tensor, x_TD: Tensor, _ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Shapes of what a backward operator returns: gradients, empty where none is wanted."""
    parameters, needs = rest[:5], rest[-1]
    return tuple(
        x_TD.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip((x_TD, *parameters), needs, strict=True)
    )
