"""The language model around the layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from dmoe.config.checks import require, require_not_negative, require_positive, require_types
from dmoe.config.moe import MoEConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only language model. `moe_layers()` says which layers are mixtures of experts."""

    vocab_size: int = 2048
    """Rows of the embedding; at least the tokeniser's."""
    hidden_size: int = 128
    """D, width of the residual stream."""
    num_layers: int = 4
    """Decoder blocks."""
    num_heads: int = 2
    """Query heads."""
    num_kv_heads: int = 1
    """Key/value heads (grouped-query attention)."""
    head_dim: int = 64
    """Width of one head."""
    qk_norm: Literal["none", "head", "full"] = "head"
    """RMSNorm on queries and keys: over each head (Qwen3), over all heads at once (OLMoE), or none."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = True
    """Head shares its weight with the embedding."""
    intermediate_size: int = 384
    """Width of a dense layer's feed-forward network."""
    moe_layer_freq: int = 1
    """Every n-th layer is a mixture of experts. 0: a dense model."""
    first_k_dense: int = 0
    """The first k layers are dense."""
    moe_layer_pattern: tuple[int, ...] = ()
    """A 1 for each layer that is a mixture of experts and a 0 for each dense one, in place of the two fields above."""
    max_seq_len: int = 4096
    """Longest sequence the model takes."""
    init_std: float = 0.02
    """Standard deviation of the initial weights, with init "mup" at `init_base_width`; "mitchell" has its own."""
    init: Literal["normal", "trunc_normal", "mitchell", "mup"] = "normal"
    """Rule of the initial weights; see `dmoe.moe.init_parameters`."""
    init_depth: Literal["all", "layer", "none"] = "all"
    """Initial output projections are divided by sqrt(2 * num_layers), by sqrt(2 * (layer + 1)), or not; "mitchell"
    divides by the second whatever this says."""
    init_base_width: int = 128
    """Width at which init "mup" is init "normal"."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """The mixture-of-experts layers."""

    def __post_init__(self) -> None:
        require_types(self, "model")
        require_positive(
            self, "model", "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
            "rope_theta", "norm_eps", "intermediate_size", "max_seq_len", "init_std", "init_base_width",
        )  # fmt: skip
        require_not_negative(self, "model", "moe_layer_freq", "first_k_dense")
        if self.moe_layer_freq and self.first_k_dense >= self.num_layers:
            wanted = f"less than model.num_layers ({self.num_layers}); a dense model has model.moe_layer_freq 0"
            require(False, "model.first_k_dense", self.first_k_dense, wanted)
        if self.moe_layer_pattern:
            pattern, wanted = self.moe_layer_pattern, f"{self.num_layers} numbers (model.num_layers), each 0 or 1"
            require(
                len(pattern) == self.num_layers and set(pattern) <= {0, 1}, "model.moe_layer_pattern", pattern, wanted
            )
            for name, default in (("moe_layer_freq", 1), ("first_k_dense", 0)):
                value = getattr(self, name)
                require(value == default, f"model.{name}", value, f"{default} with model.moe_layer_pattern")
        if self.init == "mup":
            wanted = 'False with model.init "mup", which scales the head unlike the embedding'
            require(not self.tie_embeddings, "model.tie_embeddings", True, wanted)
        require(
            self.num_heads % self.num_kv_heads == 0,
            "model.num_heads", self.num_heads, f"divisible by model.num_kv_heads ({self.num_kv_heads})",
        )  # fmt: skip
        require(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "even (rotary embedding)")
        if self.moe.hidden_size not in (0, self.hidden_size):
            require(
                False, "model.moe.hidden_size", self.moe.hidden_size,
                f"0 (taken from the model) or equal to model.hidden_size ({self.hidden_size})",
            )  # fmt: skip

    def moe_layers(self) -> list[int]:
        """Indices of the layers that are mixtures of experts."""
        if self.moe_layer_pattern:
            return [i for i, is_moe in enumerate(self.moe_layer_pattern) if is_moe]
        if self.moe_layer_freq == 0:
            return []
        return [i for i in range(self.first_k_dense, self.num_layers) if i % self.moe_layer_freq == 0]

    def layer_moe_config(self) -> MoEConfig:
        """`moe` with its width filled in."""
        return replace(self.moe, hidden_size=self.hidden_size)
