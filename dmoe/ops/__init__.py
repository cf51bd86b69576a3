"""Pure functions on tensors: routing maths, permutation, and the expert MLP with its backends.

Shape suffixes used throughout: T tokens, D model width, E experts, K picks a token, R = T*K routed rows,
F expert width, H = 2F for gated experts and F for plain ones, B batch, S sequence.
"""

from dmoe.ops.assignments import hash_assignment, random_assignment, uniform_assignment
from dmoe.ops.balancing import (
    balancing_loss_from_sums,
    expert_bias_update,
    load_balancing_loss,
    normalized_scores,
    router_entropy,
    router_z_loss,
    sums_by_sequence,
)
from dmoe.ops.capacity import capacity, keep_within_capacity
from dmoe.ops.expert_choice import expert_choice
from dmoe.ops.expert_mlp import BACKENDS, choose_backend, expert_mlp
from dmoe.ops.groups import limit_to_groups
from dmoe.ops.permute import Permutation, sort_by_expert, sum_picks
from dmoe.ops.routing import (
    choose_topk,
    count_tokens_by_sequence,
    count_tokens_per_expert,
    route,
    router_scores,
)
from dmoe.ops.sinkhorn import sinkhorn
from dmoe.ops.sparsemixer import sparsemixer

__all__ = [
    "BACKENDS",
    "Permutation",
    "balancing_loss_from_sums",
    "capacity",
    "choose_backend",
    "choose_topk",
    "count_tokens_by_sequence",
    "count_tokens_per_expert",
    "expert_bias_update",
    "expert_choice",
    "expert_mlp",
    "hash_assignment",
    "keep_within_capacity",
    "limit_to_groups",
    "load_balancing_loss",
    "normalized_scores",
    "random_assignment",
    "route",
    "router_entropy",
    "router_scores",
    "router_z_loss",
    "sinkhorn",
    "sort_by_expert",
    "sparsemixer",
    "sum_picks",
    "sums_by_sequence",
    "uniform_assignment",
]
