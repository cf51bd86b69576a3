"""Pure functions on tensors: routing maths, permutation, and the expert MLP with its backends.

Shape suffixes used throughout: T tokens, D model width, E experts, K picks a token, R = T*K routed rows,
F expert width, H = 2F for gated experts and F for plain ones, B batch, S sequence.
"""

from dmoe.ops.expert_mlp import BACKENDS, choose_backend, expert_mlp
from dmoe.ops.permute import Permutation, sort_by_expert, sum_picks
from dmoe.ops.routing import (
    choose_topk,
    count_tokens_per_expert,
    load_balancing_loss,
    router_entropy,
    router_scores,
    router_z_loss,
)

__all__ = [
    "BACKENDS",
    "Permutation",
    "choose_backend",
    "choose_topk",
    "count_tokens_per_expert",
    "expert_mlp",
    "load_balancing_loss",
    "router_entropy",
    "router_scores",
    "router_z_loss",
    "sort_by_expert",
    "sum_picks",
]
