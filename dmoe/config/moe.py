"""The mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import InitVar, dataclass
from typing import Literal

from dmoe.config.checks import require, require_not_negative, require_positive, require_types

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]
Backend = Literal["reference", "torch", "triton"]
Routing = Literal["topk", "sinkhorn", "sparsemixer", "expert_choice", "hash", "random", "uniform"]


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """One mixture-of-experts layer."""

    hidden_size: int = 0
    """D, width of the residual stream. 0: taken from the model that holds the layer."""
    intermediate_size: int = 192
    """F, width of one expert."""
    num_experts: int = 8
    """E, routed experts."""
    top_k: int = 2
    """K, experts per token."""
    activation: Activation = "silu"
    """Expert activation. With gated experts "silu" is SwiGLU; "clamped_swiglu" is the form of gpt-oss."""
    gated: bool = True
    """Gate and up projection (GLU experts), or up projection alone."""
    bias: bool = False
    """Biases in the experts."""
    routing: Routing = "topk"
    """How experts are chosen. By score: "topk", each token its K best; "sinkhorn", the K best of scores that are
    balanced over the batch in training; "sparsemixer", two that are drawn in training from those near the best
    (PhiMoE); "expert_choice", each expert its best tokens (not causal: later tokens decide on earlier ones). By no
    score: "hash" of the token id, "random", or "uniform" in turn; the scores only weigh."""
    sparsemixer_eps: float = 0.01
    """With routing "sparsemixer", experts whose logits are within twice this of the best, relatively, are near it
    (PhiMoE's `router_jitter_noise`)."""
    score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    """How router logits become scores: softmax over all experts, or of each logit its sigmoid (DeepSeek-V3) or the root
    of its softplus."""
    softmax_after_topk: bool = False
    """Choose by the logits, then softmax over the K chosen alone (gpt-oss). Their weights sum to 1."""
    norm_topk_prob: bool = True
    """Divide the K chosen scores by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed weights, after renormalisation."""
    n_group: int = 1
    """Groups of consecutive experts; a token's experts come from the `topk_group` best groups. One group a device or
    node bounds how many of them a token travels to."""
    topk_group: int = 1
    """Groups that a token may choose from."""
    group_score_top: int = 0
    """A group's score is the sum of its n best scores: 1 in DeepSeek-V2, 2 in DeepSeek-V3. 0: top_k // topk_group."""
    weigh_input: bool = False
    """Multiply what an expert reads by its routing weight, in place of what it returns (Llama 4)."""
    router_bias: bool = False
    """A learned bias on the router's logits."""
    router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Arithmetic of the router."""
    jitter_eps: float = 0.0
    """In training, multiply the router's input by noise that is uniform in [1 - eps, 1 + eps]."""
    aux_loss_coef: float = 0.01
    """Weight of the switch-style load-balancing loss in each layer; the loss is 1 at equal load. 0 turns it off."""
    seq_aux_loss_coef: float = 0.0
    """Weight of the same loss taken over each sequence by itself, and averaged."""
    global_aux_loss_coef: float = 0.0
    """Weight of the same loss with the load of all micro-batches of the optimiser step so far."""
    z_loss_coef: float = 0.001
    """Weight of the router z-loss, mean(logsumexp(logits)^2). 0 turns it off."""
    expert_bias_rate: float = 0.0
    """Auxiliary-loss-free balancing: a bias on the choice of each expert moves by this much a step, up where it had
    less than the mean load, else down (DeepSeek-V3: 0.001), and is shifted to mean 0. 0: no such bias."""
    capacity_factor: float = 0.0
    """Each expert takes at most ceil(T * K / E * factor) of a rank's picks, and the others are dropped. 0: dropless.
    With routing "expert_choice" it takes that many (0 means 1)."""
    drop_policy: Literal["probs", "position"] = "probs"
    """Which picks stay within the capacity: those of highest weight, or the first in the batch."""
    pad_to_capacity: bool = False
    """Compute every expert at its full capacity: shapes are static and no size is read from the device, also across
    ranks, which must then have equally many tokens."""
    shared_intermediate_size: int = 0
    """Width of the shared expert that every token passes through. 0: none."""
    shared_expert_gate: bool = False
    """Multiply the shared expert's output by the sigmoid of a learned map of the token (Qwen2-MoE)."""
    latent_size: int = 0
    """Width that tokens are projected to before the routed experts, and back from after them. 0: no projection."""
    backend: Backend | None = None
    """Implementation of the expert computation; None chooses by device and dtype."""
    precision: Literal["same", "fp8"] = "same"
    """Matrix products of the routed experts: in the dtype of the tensors, or with operands rounded to 8 bits, forward
    and for the gradients of activations (weight gradients stay bf16). Hopper GPUs compute in fp8, others emulate it."""

    expert_hidden_size: InitVar[int | None] = None
    """Another name for `intermediate_size`, when the layer is used by itself."""

    def __post_init__(self, expert_hidden_size: int | None) -> None:
        if expert_hidden_size is not None:
            object.__setattr__(self, "intermediate_size", expert_hidden_size)
        require_types(self, "moe")
        require_positive(self, "moe", "intermediate_size", "num_experts", "top_k", "routed_scaling_factor")
        require_positive(self, "moe", "n_group", "topk_group")
        require_not_negative(
            self, "moe", "hidden_size", "aux_loss_coef", "seq_aux_loss_coef", "global_aux_loss_coef", "z_loss_coef",
            "shared_intermediate_size", "latent_size", "expert_bias_rate", "capacity_factor", "group_score_top",
            "sparsemixer_eps",
        )  # fmt: skip
        require(0 <= self.jitter_eps < 1, "moe.jitter_eps", self.jitter_eps, "in [0, 1)")
        if self.top_k > self.num_experts:
            require(False, "moe.top_k", self.top_k, f"at most moe.num_experts ({self.num_experts})")
        if self.activation == "clamped_swiglu":
            require(self.gated, "moe.gated", self.gated, 'True with moe.activation "clamped_swiglu"')
        self._check_routing()
        self._check_groups()
        if self.pad_to_capacity and self.routing != "expert_choice":
            require(self.capacity_factor > 0, "moe.capacity_factor", 0.0, "greater than 0 with moe.pad_to_capacity")
        if self.shared_expert_gate:
            require(
                self.shared_intermediate_size > 0,
                "moe.shared_intermediate_size", 0, "greater than 0 with moe.shared_expert_gate",
            )  # fmt: skip
        if self.precision == "fp8":
            outside = "latent_size" if self.latent_size else "hidden_size"
            for name in (outside, "intermediate_size"):
                width = getattr(self, name)
                require(width % 16 == 0, f"moe.{name}", width, 'a multiple of 16 with moe.precision "fp8"')
            require(self.backend is None, "moe.backend", self.backend, 'none with moe.precision "fp8"')

    def _check_routing(self) -> None:
        if self.softmax_after_topk:
            require(
                self.score_function == "softmax",
                "moe.score_function", self.score_function, '"softmax" with moe.softmax_after_topk',
            )  # fmt: skip
        if self.routing != "topk":
            for name, off in (("expert_bias_rate", 0.0), ("n_group", 1)):
                value = getattr(self, name)
                require(value == off, f"moe.{name}", value, f'{off} with moe.routing "{self.routing}"')
        if self.routing == "sparsemixer":
            fixed = {"top_k": 2, "score_function": "softmax", "norm_topk_prob": False, "softmax_after_topk": False}
            for name, only in fixed.items():
                value = getattr(self, name)
                require(value == only, f"moe.{name}", value, f'{only!r} with moe.routing "sparsemixer"')
        if self.routing == "expert_choice":
            wanted = 'False with moe.routing "expert_choice"'
            require(not self.softmax_after_topk, "moe.softmax_after_topk", self.softmax_after_topk, wanted)
            wanted = '0.0 with moe.routing "expert_choice", which gives every expert as many tokens'
            require(not self.seq_aux_loss_coef, "moe.seq_aux_loss_coef", self.seq_aux_loss_coef, wanted)

    def _check_groups(self) -> None:
        n_group, size = self.n_group, self.num_experts // self.n_group
        require(self.num_experts % n_group == 0, "moe.n_group", n_group, f"a divisor of {self.num_experts} experts")
        require(self.topk_group <= n_group, "moe.topk_group", self.topk_group, f"at most moe.n_group ({n_group})")
        if n_group == 1:
            return
        wanted = f"at most the {self.topk_group * size} experts of moe.topk_group groups"
        require(self.top_k <= self.topk_group * size, "moe.top_k", self.top_k, wanted)
        require(self.group_score_top <= size, "moe.group_score_top", self.group_score_top, f"at most {size}")

    @property
    def expert_input_size(self) -> int:
        """Width of what the routed experts read and write."""
        return self.latent_size or self.hidden_size

    @property
    def attaches_losses(self) -> bool:
        """Whether training adds a loss of the layer's own."""
        return any((self.aux_loss_coef, self.seq_aux_loss_coef, self.global_aux_loss_coef, self.z_loss_coef))

    @property
    def balances_over_steps(self) -> bool:
        """Whether the layer needs the load of an optimiser step (`dmoe.moe.LoadBalancer`)."""
        return self.expert_bias_rate > 0 or self.global_aux_loss_coef > 0
