"""`MoE`, with a capacity for each expert, and the load-balancing loss of all layers.

Legend: T tokens, D width, E experts, e those of this rank, K picks a token, S rows on this rank.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.compat.megablocks.layers import common, mlp, mpu, router, sharedexpert_registry
from dmoe.compat.megablocks.layers.arguments import Arguments, check, uses_expert_choice, uses_paired_zloss
from dmoe.compat.megablocks.layers.balancing import balancing_loss, paired_zloss
from dmoe.compat.megablocks.layers.expert_choice import compute_chosen
from dmoe.compat.megablocks.layers.expert_parallel import exchange_and_compute
from dmoe.config import require
from dmoe.moe.recompute import recomputing
from dmoe.ops import count_tokens_per_expert, keep_within_capacity, sort_by_expert

_LOAD_BALANCING_LOSS: list[tuple[Tensor, ...]] = []


def save_load_balancing_loss(loss: tuple[Tensor, ...]) -> None:
    """Keep (tokens_per_expert, scores) of a layer, or (tokens_per_expert, scores, logits) with the fork's z-loss."""
    _LOAD_BALANCING_LOSS.append(loss)


def get_load_balancing_loss() -> list[tuple[Tensor, ...]]:
    """The list itself of what layers saved in training mode since `clear_load_balancing_loss`, in their order.

    `tokens_per_expert` is int32 [E], picks of this rank's tokens before any is dropped; `scores` is [T, E]. What
    activation checkpointing recomputes is not saved again.
    """
    return _LOAD_BALANCING_LOSS


def clear_load_balancing_loss() -> None:
    """Forget what layers saved. Call once a step: the list keeps graphs alive."""
    _LOAD_BALANCING_LOSS.clear()


def batched_load_balancing_loss(args: Arguments) -> Any:
    """moe_loss_weight / num_layers times the sum over layers of the balancing loss, which even load makes 1.

    The loss of a layer is E / (T K) * sum over experts of picks_e * mean score_e (Switch Transformers,
    arXiv:2101.03961, eq. 4, with K picks).

    Returns:
        a scalar, in the dtype of the scores or fp32 (`moe_lbl_in_fp32`); 0.0 if the weight is 0. With the z-loss of the
        fork (`arguments.uses_paired_zloss`) a pair of it and the z-loss.

    Raises:
        ConfigError: not every layer of this pipeline stage has saved exactly one entry.
    """
    paired = uses_paired_zloss(args)
    if args.moe_loss_weight == 0 and not paired:
        return 0.0
    loss = balancing_loss(_LOAD_BALANCING_LOSS, args)
    return (loss, paired_zloss(_LOAD_BALANCING_LOSS, args)) if paired else loss


class ParallelMLP(nn.Module):
    """The experts of `MoE`: each takes `capacity` picks, in the order of tokens, and adds nothing for the others.

    capacity = moe_capacity_factor * K * tokens / E, rounded down, over the tokens of all expert-parallel ranks; 0 means
    no limit. Parameters: `mlp.w1`, `mlp.w2` (see `mlp.MLP`) and with `args.bias` `bias` [D].

    Raises:
        ConfigError: see `arguments.check`, `mpu.expert_sharding_degree` and `mpu.hidden_sharding_degree`.
    """

    bias: Tensor | None

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        check(args)
        self.args = args
        self.num_experts = args.moe_num_experts
        self.top_k = args.moe_top_k
        self.sort_end_bit = max((self.num_experts - 1).bit_length(), 1)
        self.mlp = self._init_mlp(args)
        bias = torch.zeros(args.hidden_size, device=args.device, dtype=common.dtype(args)) if args.bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.forward_fn = self.parallel_forward_once if args.moe_expert_model_parallelism else self.forward_once

    def _init_mlp(self, args: Arguments) -> nn.Module:
        if args.mlp_type == "glu":
            warnings.warn(
                "mlp_type is 'glu': MoE, the layer with a capacity, has plain experts all the same; dMoE's are gated",
                stacklevel=5,
            )
        return mlp.MLP(args)

    def expert_capacity(self, tokens: int) -> int:
        """Picks that an expert takes when each rank has `tokens` tokens; 0: as many as come."""
        return self._capacity(tokens * mpu.get_expert_parallel_world_size(self.args))

    def _capacity(self, all_tokens: int) -> int:
        return int(self.args.moe_capacity_factor * (self.top_k * all_tokens / self.num_experts))

    def load_balancing_loss(self, tokens_per_expert: Tensor, expert_scores: Tensor) -> Tensor:
        """The balancing loss of one layer, without its weight: 1 for even load."""
        num_tokens = max(1, expert_scores.shape[0])
        scale = self.num_experts / (num_tokens * self.top_k)
        return scale * torch.dot(tokens_per_expert.to(expert_scores.dtype), expert_scores.sum(dim=0) / num_tokens)

    def indices_and_bins(self, top_expert: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sort picks by expert. All int32.

        Args:
            top_expert: [R] experts, pick k of token t at t * K + k.

        Returns:
            indices [R], the picks in the order of their experts; bin_ids [R], their experts; bins [E], the end of each
            expert's picks; and tokens_per_expert [E].
        """
        order_R, _, bins = sort_by_expert(top_expert.view(-1, 1), self.num_experts)
        bin_ids = top_expert.flatten()[order_R]
        return order_R.int(), bin_ids.int(), bins, torch.diff(bins, prepend=bins.new_zeros(1))

    def permute_and_compute(
        self,
        x: Tensor,
        tokens_per_expert: Tensor | None,
        indices: Tensor,
        bin_ids: Tensor,
        expert_weights: Tensor | None,
        bins: Tensor,
        expert_capacity: int,
        top_k: int,
    ) -> Tensor:
        """The weighted sums over picks of tokens `x` [T, D] that were sorted by `indices_and_bins`: [T, D].

        Experts are those of this rank. `expert_weights` is [T * top_k], None for ones. `tokens_per_expert` and `bins`
        are not read.
        """
        x = x.reshape(-1, x.shape[-1])
        ids = torch.empty_like(bin_ids).scatter_(0, indices.long(), bin_ids).view(-1, top_k)
        weights = x.new_ones(ids.shape) if expert_weights is None else expert_weights.view(ids.shape)
        ids, weights = self._keep(ids, weights, expert_capacity)
        return self.mlp(x, top_experts=ids, expert_weights=weights)

    def _keep(self, ids_TK: Tensor, weights_TK: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
        """The picks of local experts within the capacity; the others are of no expert."""
        if capacity <= 0:
            return ids_TK, weights_TK
        num_experts = mpu.experts_per_rank(self.args)
        return keep_within_capacity(ids_TK, weights_TK, num_experts, capacity, "position")[:2]

    def _compute_local(self, x: Tensor, ids: Tensor, weights: Tensor, all_tokens: int) -> Tensor:
        ids, weights = self._keep(ids, weights, self._capacity(all_tokens))
        return self.mlp(x, top_experts=ids, expert_weights=weights)

    def forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        """All experts are on this rank: ([T, D], tokens_per_expert)."""
        x = x.reshape(-1, x.shape[-1])
        if uses_expert_choice(self.args):
            return compute_chosen(
                x, expert_weights, top_experts, lambda x, ids, w: self.mlp(x, top_experts=ids, expert_weights=w)
            )
        ids, weights = top_experts.reshape(-1, self.top_k), expert_weights.reshape(-1, self.top_k)
        out = self._compute_local(x, ids, weights, x.shape[0])
        return out, count_tokens_per_expert(ids.long(), self.num_experts).int()

    def parallel_forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        """The experts are spread over `args.expert_parallel_group`: as `forward_once`. Collective."""
        ids, weights = top_experts.reshape(-1, self.top_k), expert_weights.reshape(-1, self.top_k)
        out = exchange_and_compute(x.reshape(-1, x.shape[-1]), ids, weights, self.args, self._compute_local)
        return out, count_tokens_per_expert(ids.long(), self.num_experts).int()

    def forward(self, x: Tensor, scores: Tensor, *routing: Tensor) -> Any:
        """Compute the experts.

        Args:
            x: [..., D].
            scores: [T, E].
            routing: expert_weights and top_experts, [T, K] each; or logits [T, E] and these two.

        Returns:
            the shape of `x`; with `args.bias` and `args.return_bias` a pair of that and the bias.
        """
        *logits, expert_weights, top_experts = routing
        out, tokens_per_expert = self.forward_fn(x, expert_weights, top_experts)
        paired = uses_paired_zloss(self.args)
        if self.training and (self.args.moe_loss_weight > 0 or paired) and not recomputing():
            save_load_balancing_loss((tokens_per_expert, scores, *(logits if paired else ())))
        out = out.view(x.shape)
        if self.bias is None:
            return out
        return (out, self.bias) if self.args.return_bias else out + self.bias


class MoE(nn.Module):
    """A mixture of experts that drops picks past each expert's capacity.

    `router`, `experts` and `shared_expert` may be replaced by wrappers of them. Parameters: `router.layer.weight`
    [E, D], those of `ParallelMLP` under `experts`, and with `args.shared_expert` those of `shared_expert`.

    Raises:
        ConfigError: see `ParallelMLP`.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        check(args)
        self.args = args
        self.router: nn.Module = router.LearnedRouter(args)
        self.experts: nn.Module = self._init_experts_mlp(args)
        self.shared_expert: nn.Module | None = sharedexpert_registry.get(args) if args.shared_expert else None

    def _init_experts_mlp(self, args: Arguments) -> ParallelMLP:
        return ParallelMLP(args)

    def forward(self, x: Tensor) -> Any:
        """Apply the layer to `x` [..., D], whose dtype is that of the parameters unless autocast is on.

        Returns:
            the shape of `x`; with `args.bias` and `args.return_bias` (out, bias), to be added by the caller.

        Raises:
            ConfigError: the width of `x` is not `args.hidden_size`.
        """
        width = self.args.hidden_size
        require(
            x.dim() > 1 and x.shape[-1] == width,
            "shape of x",
            tuple(x.shape),
            f"[tokens, {width}] or [.., .., {width}]",
        )
        x = common.cast_if_autocast_enabled(x)
        out = self.experts(x, *self.router(x))
        if self.shared_expert is None:
            return out
        out, bias = out if isinstance(out, tuple) else (out, None)
        out = self._add_shared(self.shared_expert(x), out)
        if bias is None:
            return out
        # The caller adds it to what was scaled already.
        scale = self.args.moe_top_k / (self.args.moe_top_k + 1)
        return out, bias * scale if self.args.shared_expert_weighted_sum else bias

    def _add_shared(self, shared_out: Tensor, out: Tensor) -> Tensor:
        add = getattr(self.shared_expert, "add_experts_sharedexpert", None)  # a wrapper has none
        return mlp.add_experts_sharedexpert(self.args, shared_out, out) if add is None else add(shared_out, out)
