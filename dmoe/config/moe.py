"""The mixture-of-experts layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dmoe.config.checks import require, require_not_negative, require_positive, require_types

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu"]
Backend = Literal["reference", "torch", "triton"]


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
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How router logits become scores: softmax over all experts, or a sigmoid each (DeepSeek-V3)."""
    norm_topk_prob: bool = True
    """Divide the K chosen scores by their sum."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed weights, after renormalisation."""
    aux_loss_coef: float = 0.01
    """Weight of the switch-style load-balancing loss in each layer; the loss is 1 at equal load. 0 turns it off."""
    z_loss_coef: float = 0.001
    """Weight of the router z-loss, mean(logsumexp(logits)^2). 0 turns it off."""
    shared_intermediate_size: int = 0
    """Width of the shared expert that every token passes through. 0: none."""
    backend: Backend | None = None
    """Implementation of the expert computation; None chooses by device and dtype."""
    precision: Literal["same", "fp8"] = "same"
    """Matrix products of the routed experts: in the dtype of the tensors, or with operands rounded to 8 bits, forward
    and for the gradients of activations (weight gradients stay bf16). Hopper GPUs compute in fp8, others emulate it."""

    def __post_init__(self) -> None:
        require_types(self, "moe")
        require_positive(self, "moe", "intermediate_size", "num_experts", "top_k", "routed_scaling_factor")
        require_not_negative(self, "moe", "hidden_size", "aux_loss_coef", "z_loss_coef", "shared_intermediate_size")
        if self.top_k > self.num_experts:
            require(False, "moe.top_k", self.top_k, f"at most moe.num_experts ({self.num_experts})")
        if self.activation == "clamped_swiglu":
            require(self.gated, "moe.gated", self.gated, 'True with moe.activation "clamped_swiglu"')
        if self.precision == "fp8":
            for name in ("hidden_size", "intermediate_size"):
                width = getattr(self, name)
                require(width % 16 == 0, f"moe.{name}", width, 'a multiple of 16 with moe.precision "fp8"')
            require(self.backend is None, "moe.backend", self.backend, 'none with moe.precision "fp8"')
