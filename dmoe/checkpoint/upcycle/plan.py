"""`UpcyclePlan`: how a dense model becomes a mixture of experts, and the config of the result."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from dmoe.config import ModelConfig, MoEConfig, require
from dmoe.config.checks import require_not_negative, require_positive, require_types

Method = Literal["copy", "drop", "noise"]
RouterInit = Literal["normal", "independent", "zero"]


@dataclass(frozen=True, kw_only=True)
class UpcyclePlan:
    """What is asked for. F is the width of the dense network, G the granularity.

    Each network becomes `num_experts` copies, and each copy G experts that hold F / G of its channels each: expert
    c * G + g is part g of copy c. Copying with weights that sum to 1 is sparse upcycling (Komatsuzaki et al.,
    arXiv:2212.05055, section 2.1); parts, with the router of "virtual groups", are granular upcycling (He et al.,
    arXiv:2410.07524, section 3).
    """

    num_experts: int
    """Copies of each dense network. The model has this many experts times the granularity."""
    top_k: int
    """Copies that a token goes through at first: it chooses top_k times the granularity experts."""
    granularity: int = 1
    """G, experts that a copy is split into; divides F, less the shared expert's part."""
    method: Method = "copy"
    """"copy" keeps the weights; "drop" draws a share of each expert's channels anew (Nakamura et al., "Drop-Upcycling",
    arXiv:2502.19261, section 3); "noise" adds normal noise."""
    drop_ratio: float = 0.5
    """With "drop": share of each expert's channels that is drawn anew, in gate, up and down projection together, from a
    normal distribution with the mean and standard deviation of what it replaces in that matrix."""
    noise_std: float = 0.01
    """With "noise": its standard deviation, in units of that of the dense matrix it is added to."""
    shuffle: bool = False
    """Put the channels of each copy in an order of its own before it is split. With "drop" this is the recipe of
    Qwen2-57B-A14B (Yang et al., arXiv:2407.10671, section 2.2.2)."""
    router_init: RouterInit = "normal"
    """"normal": a random row for each copy, which its G experts share, so that they are chosen together (a virtual
    group for each part). "independent": a random row for each expert. "zero": all scores equal."""
    router_std: float = 0.02
    """Standard deviation of the router's weights."""
    score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    """See `MoEConfig.score_function`."""
    norm_topk_prob: bool = True
    """See `MoEConfig.norm_topk_prob`. Without it weights are scaled to be right where all scores are equal."""
    shared_size: int = 0
    """Width of a shared expert. 0: none. Less than F: it takes the first of the dense network's channels and the routed
    experts hold the others. F: it is a copy of the dense network, and it and the routed experts give half each."""
    shared_gate: bool = False
    """Gate the shared expert with a learned map that starts at 0, that is at a factor of 1/2, which its weights make
    up for (the form of Qwen2-MoE)."""
    layers: str = "all"
    """Which layers become mixtures: "all"; "every-N", that is layers N, 2N, ... counted from 1; "after-N", all but the
    first N; or a 1 or 0 for each layer, as in "0011"."""
    aux_loss_coef: float = 0.01
    """See `MoEConfig.aux_loss_coef`."""
    z_loss_coef: float = 0.001
    """See `MoEConfig.z_loss_coef`."""
    seed: int = 0
    """Every random number is a function of this, the name of the tensor and the expert."""

    def __post_init__(self) -> None:
        require_types(self, "upcycle")
        require_positive(self, "upcycle", "num_experts", "top_k", "granularity")
        require_not_negative(self, "upcycle", "noise_std", "router_std", "shared_size", "seed")
        E, k, G = self.num_experts, self.top_k, self.granularity
        require(k <= E, "upcycle.top_k", k, f"at most upcycle.num_experts ({E}): both count copies")
        require(0 <= self.drop_ratio <= 1, "upcycle.drop_ratio", self.drop_ratio, "in [0, 1]")
        if self.router_init == "zero" and G > 1 and k < E:
            wanted = '"normal" with upcycle.granularity > 1: by equal scores no token can choose the parts of one copy'
            require(False, "upcycle.router_init", self.router_init, wanted)
        if self.router_init != "zero":
            require(self.router_std > 0, "upcycle.router_std", self.router_std, 'greater than 0, or router_init "zero"')
        if self.shared_gate:
            require(self.shared_size > 0, "upcycle.shared_size", 0, "greater than 0 with upcycle.shared_gate")

    def config(self, dense: ModelConfig) -> ModelConfig:
        """The config of the upcycled model.

        Raises:
            ConfigError: the model is not dense, or the plan does not fit it.
        """
        mixtures = dense.moe_layers()
        if mixtures:
            wanted = "none: only a dense model can be upcycled"
            require(False, "mixture-of-experts layers of the source", mixtures, wanted)
        moe = MoEConfig(
            intermediate_size=self.expert_size(dense.intermediate_size),
            num_experts=self.num_experts * self.granularity,
            top_k=self.top_k * self.granularity,
            bias=dense.mlp_bias,
            score_function=self.score_function,
            norm_topk_prob=self.norm_topk_prob,
            shared_intermediate_size=self.shared_size,
            shared_expert_gate=self.shared_gate,
            aux_loss_coef=self.aux_loss_coef,
            z_loss_coef=self.z_loss_coef,
        )
        first, pattern = _layer_fields(chosen_layers(self.layers, dense.num_layers))
        return replace(dense, moe=moe, moe_layer_freq=1, first_k_dense=first, moe_layer_pattern=pattern)

    def routed_size(self, width: int) -> int:
        """Channels of a dense network of this width that a copy has: those that the shared expert did not take."""
        require(self.shared_size <= width, "upcycle.shared_size", self.shared_size, f"at most the dense width, {width}")
        return width if self.shared_size in (0, width) else width - self.shared_size

    def expert_size(self, width: int) -> int:
        """Channels of an expert."""
        routed, G = self.routed_size(width), self.granularity
        less = f", which is {width} less upcycle.shared_size" if routed != width else ""
        require(routed % G == 0, "upcycle.granularity", G, f"a divisor of the width of a copy, {routed}{less}")
        return routed // G

    def num_dropped(self, width: int) -> int:
        """Channels of each expert that are drawn anew: the ratio of them, rounded (halves up)."""
        return math.floor(self.drop_ratio * self.expert_size(width) + 0.5) if self.method == "drop" else 0

    def routed_scale(self, width: int) -> float:
        """Factor on the experts' down projections that makes up for the routing weights.

        With all scores equal each of the k * G chosen experts weighs w, and each part of the network is there k times,
        so the factor is 1 / (k * w): G for weights that sum to 1, E * G / k for a plain softmax over the E * G experts
        (arXiv:2410.07524, section 3.2, which spreads it over all three matrices; on the down projection, which is
        linear, it is exact). Half of it beside a shared copy.
        """
        E, k, G = self.num_experts, self.top_k, self.granularity
        if self.norm_topk_prob:
            scale = float(G)
        elif self.score_function == "softmax":
            scale = E * G / k
        else:
            scale = 1 / (k * (0.5 if self.score_function == "sigmoid" else math.sqrt(math.log(2))))
        return scale * (1 - self.shared_share(width))

    def shared_share(self, width: int) -> float:
        """Part of the output that a shared copy gives: 1/2, or 0 where there is no shared expert or it is no copy."""
        return 0.5 if self.shared_size == width else 0.0

    def shared_scale(self, width: int) -> float:
        """Factor on the shared expert's down projection."""
        return (0.5 if self.shared_size == width else 1.0) * (2.0 if self.shared_gate else 1.0)


def chosen_layers(layers: str, num_layers: int) -> tuple[int, ...]:
    """A 1 for each layer that becomes a mixture and a 0 for each other; see `UpcyclePlan.layers`."""
    kind, _, number = layers.partition("-")
    digits = layers.replace(",", "").replace(" ", "")
    chosen: tuple[int, ...] = ()
    if layers == "all":
        chosen = (1,) * num_layers
    elif kind == "every" and number.isdecimal() and int(number) > 0:
        chosen = tuple(int((i + 1) % int(number) == 0) for i in range(num_layers))
    elif kind == "after" and number.isdecimal():
        chosen = tuple(int(i >= int(number)) for i in range(num_layers))
    elif set(digits) <= {"0", "1"} and len(digits) == num_layers:
        chosen = tuple(map(int, digits))
    wanted = f'"all", "every-N", "after-N" or {num_layers} digits, each 0 or 1; and at least one of the layers'
    require(any(chosen), "upcycle.layers", layers, wanted)
    return chosen


def _layer_fields(chosen: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """first_k_dense and moe_layer_pattern of `ModelConfig` for a choice of layers; no pattern where none is needed."""
    first = chosen.index(1)
    return (first, ()) if all(chosen[first:]) else (0, chosen)
