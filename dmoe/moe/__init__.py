"""The mixture-of-experts layer: router, experts, auxiliary losses, load statistics."""

from dmoe.config import MoEConfig
from dmoe.moe.balancer import LoadBalancer
from dmoe.moe.batch_sums import BatchGroups
from dmoe.moe.experts import Experts, FeedForward
from dmoe.moe.init import init_parameters
from dmoe.moe.layer import MoE, moe_layers, set_aux_loss_scale
from dmoe.moe.losses import attach_loss
from dmoe.moe.packed import pack_experts, unpack_experts
from dmoe.moe.recorder import LoadSummary, Recorder
from dmoe.moe.replay import RoutingTrace, record_routing, replay_routing
from dmoe.moe.router import Router, Routing
from dmoe.moe.stats import LayerStats

__all__ = [
    "BatchGroups",
    "Experts",
    "FeedForward",
    "LayerStats",
    "LoadBalancer",
    "LoadSummary",
    "MoE",
    "MoEConfig",
    "Recorder",
    "Router",
    "Routing",
    "RoutingTrace",
    "attach_loss",
    "init_parameters",
    "moe_layers",
    "pack_experts",
    "record_routing",
    "replay_routing",
    "set_aux_loss_scale",
    "unpack_experts",
]
