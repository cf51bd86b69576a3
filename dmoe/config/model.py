"""The language model around the layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from dmoe.config.attention import LatentAttentionConfig, RopeConfig
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
    """Key/value heads (grouped-query attention). Latent attention has `num_heads` of them."""
    head_dim: int = 64
    """Width of one head. Latent attention has widths of its own."""
    qk_norm: Literal["none", "head", "full", "l2"] = "head"
    """RMSNorm on queries and keys: over each head (Qwen3), over all heads at once (OLMoE), over each head after the
    rotation and without a weight, where there is one (Llama 4: "l2"), or none."""
    clip_qkv: float = 0.0
    """Clamp queries, keys and values to [-this, this], after `qk_norm` and before the rotation. 0: no bound."""
    qkv_bias: bool = False
    """Biases of the query, key and value projections; in latent attention of those into a latent."""
    attention_out_bias: bool = False
    """A bias of the output projection of attention."""
    attention_sinks: bool = False
    """A learned logit a head that takes part in every softmax and has no value (gpt-oss)."""
    attention_scale: float = 0.0
    """Factor on query-key products. 0: 1 / sqrt(width of a query head), in latent attention times the square of
    YaRN's `mscale_all_dim` factor."""
    attention_window: int = 0
    """Keys that a query of a "sliding" layer sees, itself included; or the chunk of a "chunked" layer, which is counted
    from the first token that is no padding. 0: all."""
    layer_attention: tuple[Literal["full", "sliding", "chunked"], ...] = ()
    """Of each layer: a query sees all earlier keys, those in its window, or those in its chunk of the sequence. Empty:
    all "sliding" with an `attention_window`, else "full"."""
    layer_rope: tuple[int, ...] = ()
    """A 1 for each layer with a rotary embedding and a 0 for each without. Empty: all have one."""
    attention_temperature_scale: float = 0.0
    """In layers without a rotary embedding, queries at position p are multiplied by
    1 + this * ln(1 + floor((p + 1) / attention_temperature_floor)) (Llama 4). 0: they are not."""
    attention_temperature_floor: int = 8192
    """See `attention_temperature_scale`."""
    rope_theta: float = 10000.0
    """Base of the rotary embedding."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Variants of the rotary embedding."""
    latent: LatentAttentionConfig = field(default_factory=LatentAttentionConfig)
    """Latent attention, in place of grouped queries."""
    norm: Literal["rms", "layer"] = "rms"
    """RMSNorm, or LayerNorm with biases (PhiMoE), before attention, before the network and before the head."""
    norm_eps: float = 1e-6
    """Epsilon of every norm, but 1e-6 in those of latents."""
    tie_embeddings: bool = True
    """Head shares its weight with the embedding."""
    head_bias: bool = False
    """A bias of the head."""
    embedding_multiplier: float = 1.0
    """Factor on embeddings (Granite); not on a tied head."""
    residual_multiplier: float = 1.0
    """Factor on what attention and network add to the residual stream (Granite)."""
    logits_divisor: float = 1.0
    """Divisor of the logits (Granite)."""
    intermediate_size: int = 384
    """Width of a dense layer's feed-forward network."""
    mlp_bias: bool = False
    """Biases of a dense layer's feed-forward network."""
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
            "attention_temperature_floor", "embedding_multiplier", "residual_multiplier", "logits_divisor",
        )  # fmt: skip
        require_not_negative(
            self, "model", "moe_layer_freq", "first_k_dense", "clip_qkv", "attention_scale", "attention_window",
            "attention_temperature_scale",
        )  # fmt: skip
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
        self._check_attention()
        self._check_rope()
        if self.moe.hidden_size not in (0, self.hidden_size):
            require(
                False, "model.moe.hidden_size", self.moe.hidden_size,
                f"0 (taken from the model) or equal to model.hidden_size ({self.hidden_size})",
            )  # fmt: skip

    def _check_attention(self) -> None:
        if self.layer_attention:
            kinds, wanted = self.layer_attention, f"{self.num_layers} kinds of attention (model.num_layers)"
            require(len(kinds) == self.num_layers, "model.layer_attention", kinds, wanted)
            if set(kinds) != {"full"}:
                wanted = f"greater than 0 with {' and '.join(sorted(set(kinds) - {'full'}))} layers"
                require(self.attention_window > 0, "model.attention_window", self.attention_window, wanted)
        if self.layer_rope:
            flags, wanted = self.layer_rope, f"{self.num_layers} numbers (model.num_layers), each 0 or 1"
            require(len(flags) == self.num_layers and set(flags) <= {0, 1}, "model.layer_rope", flags, wanted)
        if self.latent.kv_lora_rank:
            for name, off in (("qk_norm", "none"), ("attention_sinks", False), ("clip_qkv", 0.0)):
                value, wanted = getattr(self, name), f"{off!r} with latent attention (model.latent.kv_lora_rank)"
                require(value == off, f"model.{name}", value, wanted)

    def _check_rope(self) -> None:
        fraction = self.rope.fraction
        if self.latent.kv_lora_rank:
            wanted = "1.0 with latent attention, where model.latent.qk_rope_head_dim is the rotated part"
            require(fraction == 1, "model.rope.fraction", fraction, wanted)
        else:
            require(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "even (rotary embedding)")
            wanted = f"so that an even number of the {self.head_dim} dimensions (model.head_dim) is rotated"
            require(self.rotary_dim > 0 and self.rotary_dim % 2 == 0, "model.rope.fraction", fraction, wanted)
        if self.rope.scaling == "longrope":
            wanted = f"{self.rotary_dim // 2} numbers, one for each pair of rotated dimensions"
            require(
                len(self.rope.long_factors) == self.rotary_dim // 2,
                "model.rope.long_factors", self.rope.long_factors, wanted,
            )  # fmt: skip

    @property
    def rotary_dim(self) -> int:
        """Rotated dimensions of a query or key head."""
        return self.latent.qk_rope_head_dim if self.latent.kv_lora_rank else int(self.head_dim * self.rope.fraction)

    @property
    def query_head_dim(self) -> int:
        """Width of a query or key head."""
        latent = self.latent
        return latent.qk_nope_head_dim + latent.qk_rope_head_dim if latent.kv_lora_rank else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of a value head."""
        return self.latent.v_head_dim if self.latent.kv_lora_rank else self.head_dim

    def attention_kind(self, layer: int) -> Literal["full", "sliding", "chunked"]:
        """What a query of a layer sees: all earlier keys, its window, or its chunk."""
        if self.layer_attention:
            return self.layer_attention[layer]
        return "sliding" if self.attention_window else "full"

    def has_rope(self, layer: int) -> bool:
        """Whether a layer has a rotary embedding."""
        return not self.layer_rope or bool(self.layer_rope[layer])

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
