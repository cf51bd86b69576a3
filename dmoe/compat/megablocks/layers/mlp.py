"""The experts' weights: `MLP` of `MoE`, `SparseMLP` and `GroupedMLP` of `dMoE`, and the shared expert.

Legend: T tokens, D width, K picks, R rows grouped by expert, e experts of this rank, F their features on this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dmoe.compat.megablocks.layers import common, mpu
from dmoe.compat.megablocks.layers.arguments import Arguments, InitFn
from dmoe.compat.megablocks.layers.expert_compute import Activation, compute_experts, compute_rows
from dmoe.compat.megablocks.layers.topology import features_of, tokens_per_expert_of
from dmoe.config import require


class ScaleGradient(torch.autograd.Function):
    """The identity, with the gradient times a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None


scale_gradient = ScaleGradient.apply


def resolve_dtensor(weight: Tensor) -> Tensor:
    """The part of a DTensor that is on this rank; another tensor as it is."""
    from torch.distributed.tensor import DTensor

    return weight.to_local() if isinstance(weight, DTensor) else weight


def create_moe_expert_weights(
    args: Arguments, num_experts: int, ffn_hidden_size: int, hidden_size: int, init_method: InitFn
) -> Tensor:
    """[e, F, hidden_size]: this rank's part of weights that were drawn whole.

    Every rank draws [num_experts, ffn_hidden_size, hidden_size] on `args.device`, so that with the same seed on all
    ranks the weights do not depend on how they are spread.
    """
    weights = torch.empty(num_experts, ffn_hidden_size, hidden_size, device=args.device, dtype=common.dtype(args))
    init_method(weights)
    if not args.moe_expert_model_parallelism:
        return weights
    degree = mpu.expert_sharding_degree(args)
    column, row = mpu.get_expert_parallel_rank(args) % degree, mpu.get_expert_parallel_rank(args) // degree
    experts, features = num_experts // degree, ffn_hidden_size // mpu.hidden_sharding_degree(args)
    return weights[column * experts : (column + 1) * experts, row * features : (row + 1) * features]


def create_dmoe_expert_weights(
    args: Arguments, num_experts: int, rows: int, columns: int, init_method: InitFn
) -> Tensor:
    """`create_moe_expert_weights` as [e * F, columns]."""
    return create_moe_expert_weights(args, num_experts, rows, columns, init_method).reshape(-1, columns)


class _ExpertWeights(nn.Module):
    """What the two kinds have in common."""

    w1: nn.Parameter
    w2: nn.Parameter

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.gradient_scale: float | None = None
        if args.moe_expert_model_parallelism:
            # Each rank's loss is a mean over its own tokens, and no average over data-parallel ranks follows.
            self.gradient_scale = 1 / mpu.get_expert_parallel_world_size(args)

    def scale_grad(self, w: Tensor) -> Tensor:
        """`w`, whose gradient is the mean over the expert-parallel ranks and not their sum."""
        return w if self.gradient_scale is None else scale_gradient(w, self.gradient_scale)

    def _local(self, w: Tensor) -> Tensor:
        return resolve_dtensor(self.scale_grad(w))

    def _add_weight(self, name: str, *shape: int) -> Tensor:
        weight = torch.empty(*shape, device=self.args.device, dtype=common.dtype(self.args))
        self.register_parameter(name, nn.Parameter(weight))
        mpu.set_expert_model_parallel_attributes(getattr(self, name), self.args.moe_expert_model_parallelism)
        return getattr(self, name).detach()

    def _weights_EFD(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """w1, v1 and w2 as they are at this moment: a consumer may put a DTensor in their place."""
        raise NotImplementedError

    def _compute(self, x_TD: Tensor, top_experts: Tensor, expert_weights: Tensor) -> Tensor:
        args = self.args
        assert args.activation_fn is not None
        return compute_experts(
            x_TD, top_experts, expert_weights, *self._weights_EFD(), args.activation_fn,
            memory_optimized=args.memory_optimized_mlp,
        )  # fmt: skip

    def _compute_rows(self, x_RD: Tensor, counts_e: Tensor) -> Tensor:
        args = self.args
        assert args.activation_fn is not None
        return compute_rows(
            x_RD, counts_e, *self._weights_EFD(), args.activation_fn, memory_optimized=args.memory_optimized_mlp
        )


class MLP(_ExpertWeights):
    """Plain experts of `MoE`: `w1` [e, D, F] and `w2` [e, F, D], y = act(x w1) w2."""

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        shape = mpu.experts_per_rank(args), args.hidden_size, mpu.features_per_rank(args)
        w1, w2 = self._add_weight("w1", *shape), self._add_weight("w2", shape[0], shape[2], shape[1])
        sizes = args.moe_num_experts, args.ffn_hidden_size, args.hidden_size
        w1.copy_(create_moe_expert_weights(args, *sizes, args.init_method).transpose(1, 2))
        w2.copy_(create_moe_expert_weights(args, *sizes, args.output_layer_init_method))

    def _weights_EFD(self) -> tuple[Tensor, None, Tensor]:
        return self._local(self.w1).transpose(1, 2), None, self._local(self.w2)

    def forward(self, x: Tensor, *, top_experts: Tensor | None = None, expert_weights: Tensor | None = None) -> Tensor:
        """Of rows [e, capacity, D], an expert's rows each; the same shape. Or of tokens [T, D] with local experts and
        weights [T, K] of their picks: their weighted sums [T, D]."""
        if top_experts is not None:
            assert expert_weights is not None
            return self._compute(x, top_experts, expert_weights)
        counts = torch.full((x.shape[0],), x.shape[1], device=x.device)
        return self._compute_rows(x.flatten(0, 1), counts).view(x.shape)


class SparseMLP(_ExpertWeights):
    """Plain experts of `dMoE`: `w1` and `w2` [e * F, D], y = act(x w1_i^T) w2_i for expert i, F rows each."""

    def __init__(self, args: Arguments) -> None:
        super().__init__(args)
        self._num_rows_per_rank = mpu.experts_per_rank(args) * mpu.features_per_rank(args)
        shape = self._num_rows_per_rank, args.hidden_size
        w1, w2 = self._add_weight("w1", *shape), self._add_weight("w2", *shape)
        w1.copy_(self._draw(args.init_method))
        w2.copy_(self._draw(args.output_layer_init_method))

    def _draw(self, init_method: InitFn) -> Tensor:
        args = self.args
        return create_dmoe_expert_weights(
            args, args.moe_num_experts, args.ffn_hidden_size, args.hidden_size, init_method
        )

    def _view(self, w: Tensor) -> Tensor:
        return self._local(w).view(mpu.experts_per_rank(self.args), -1, self.args.hidden_size)

    def _weights_EFD(self) -> tuple[Tensor, Tensor | None, Tensor]:
        return self._view(self.w1), None, self._view(self.w2)

    def forward(
        self,
        x: Tensor,
        tokens_per_expert: Any = None,
        *,
        top_experts: Tensor | None = None,
        expert_weights: Tensor | None = None,
    ) -> Tensor:
        """Of rows [R, D] grouped by expert, with `tokens_per_expert` [e] saying how many each has; the same shape.

        `tokens_per_expert` may be a topology instead (`ParallelDroplessMLP.topology`, or an `stk.Matrix`), of groups
        that are padded to blocks. Or, instead of it, the local experts and the weights of the K picks of tokens [T, D],
        each [T, K]: their weighted sums [T, D].
        """
        if top_experts is not None:
            assert expert_weights is not None
            return self._compute(x, top_experts, expert_weights)
        if not isinstance(tokens_per_expert, Tensor):
            require(tokens_per_expert is not None, "tokens_per_expert", None, "the number of rows of each expert")
            tokens_per_expert = tokens_per_expert_of(tokens_per_expert, mpu.experts_per_rank(self.args))
        return self._compute_rows(x, tokens_per_expert)


class GroupedMLP(SparseMLP):
    """`SparseMLP` by the name of `mlp_impl="grouped"`; the same computation."""


class MemoryOptimizedMLP:
    """`SparseMLP` as a function of its weights that keeps x and the first product for the backward.

    Not an autograd function itself: frozen inputs and weights are fine, and the incoming gradient is not overwritten.
    """

    @staticmethod
    def apply(x: Tensor, w1: Tensor, w2: Tensor, topo: Any, activation_fn: Activation) -> Tensor:
        """Rows [R, D] padded to blocks, weights [e * F, D], and their topology; [R, D]."""
        num_experts = w1.shape[0] // features_of(topo)
        counts_e = tokens_per_expert_of(topo, num_experts)
        w1, w2 = w1.view(num_experts, -1, w1.shape[1]), w2.view(num_experts, -1, w2.shape[1])
        return compute_rows(x, counts_e, w1, None, w2, activation_fn, memory_optimized=True)


class MemoryOptimizedGroupedMLP:
    """`GroupedMLP` as a function of its weights; see `MemoryOptimizedMLP`."""

    @staticmethod
    def apply(x: Tensor, w1: Tensor, w2: Tensor, batch_sizes: Tensor, activation_fn: Activation) -> Tensor:
        """Rows [R, D] grouped by expert, weights [e, F, D], and the number of rows of each expert [e]; [R, D]."""
        return compute_rows(x, batch_sizes, w1, None, w2, activation_fn, memory_optimized=True)


memory_optimized_mlp = MemoryOptimizedMLP.apply
memory_optimized_grouped_mlp = MemoryOptimizedGroupedMLP.apply


class SharedMLP(nn.Module):
    """The shared expert, through which every token goes: down_proj(act(up_proj(x)))."""

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        self.args = args
        self.fc_kwargs: dict[str, Any] = {"bias": args.bias, "device": args.device, **args.fc_kwargs}
        self.up_proj = args.fc_cls(args.hidden_size, args.shared_expert_hidden_size, **self.fc_kwargs)
        assert args.activation_fn is not None
        self.act = args.activation_fn
        self.down_proj = args.fc_cls(args.shared_expert_hidden_size, args.hidden_size, **self.fc_kwargs)
        self.down_proj._is_residual = True  # llm-foundry initialises such layers with a smaller deviation

    def add_experts_sharedexpert(self, shared_expert_out: Tensor, expert_out: Tensor) -> Tensor:
        """See the function of the same name."""
        return add_experts_sharedexpert(self.args, shared_expert_out, expert_out)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to the same."""
        return self.down_proj(self.act(self.up_proj(x)))


def add_experts_sharedexpert(args: Arguments, shared_expert_out: Tensor, expert_out: Tensor) -> Tensor:
    """Their sum; with `shared_expert_weighted_sum` the mean over top_k + 1 experts, of which the shared one is one."""
    if not args.shared_expert_weighted_sum:
        return shared_expert_out + expert_out
    num_experts = args.moe_top_k + 1
    return (shared_expert_out / num_experts).add(expert_out, alpha=args.moe_top_k / num_experts)
