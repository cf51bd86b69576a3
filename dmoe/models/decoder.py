"""`Decoder`: a decoder-only language model with a dense or mixture-of-experts feed-forward network in each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.config import ModelConfig, require
from dmoe.models.attention import Attention, rotary_tables
from dmoe.moe import FeedForward, MoE, init_parameters, moe_layers


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `mlp` is a `FeedForward` or a `MoE`."""

    def __init__(self, config: ModelConfig, *, moe: bool) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MoE(config.layer_moe_config()) if moe else FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor, mask_BS: Tensor | None = None, ids_BS: Tensor | None = None
    ) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), cos_SH, sin_SH)
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, MoE):
            return x_BSD + self.mlp(normed_BSD, token_mask=mask_BS, token_ids=ids_BS)
        return x_BSD + self.mlp(normed_BSD)


class Decoder(nn.Module):
    """Decoder-only transformer. Parameter names follow Hugging Face's Llama family, without the prefix `model.`.

    Build large models with `Decoder.on_meta(config)`, then `to_empty(device=...)` and `init_weights` or a checkpoint.

    `dmoe.parallel` may leave it a part of the model: some layers, not `is_first` (hidden states come in) or not
    `is_last` (hidden states go out). `positions(n, device)` are the positions of the n tokens that this rank holds, and
    `moe_columns` picks from [B, S] the columns that its MoE layers see.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.is_first = self.is_last = True
        self.positions: Callable[[int, torch.device], Tensor] = _all_positions
        self.moe_columns: Callable[[Tensor], Tensor] = _all_columns
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        mixtures = set(config.moe_layers())
        self.layers = nn.ModuleList(DecoderLayer(config, moe=i in mixtures) for i in range(config.num_layers))
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mlp, MoE):
                layer.mlp.router.hash_seed = i
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    @property
    def blocks(self) -> list[DecoderLayer]:
        """The layers that this model or part of one has."""
        return [layer for layer in self.layers.children() if isinstance(layer, DecoderLayer)]

    @classmethod
    def on_meta(cls, config: ModelConfig) -> Decoder:
        """The model without memory for its weights."""
        with torch.device("meta"):
            return cls(config)

    def to_empty(self, *, device: torch.device | str | int | None, recurse: bool = True) -> Decoder:
        """Allocate uninitialised weights on `device`. A tied head stays tied."""
        super().to_empty(device=device, recurse=recurse)
        self.tie_weights()
        return self

    def tie_weights(self) -> None:
        """Let head and embedding share one parameter again, if the config ties them."""
        if self.config.tie_embeddings and self.is_last:
            self.lm_head.weight = self.embed_tokens.weight

    def init_weights(self, seed: int = 0) -> None:
        """Random weights by `config.init`, `init_depth` and `init_std`, every parameter from a stream of its own; the
        biases of the choice are 0."""
        config = self.config
        init_parameters(
            self, std=config.init_std, seed=seed, rule=config.init, depth=config.init_depth,
            num_layers=config.num_layers, base_width=config.init_base_width,
        )  # fmt: skip
        for layer in moe_layers(self).values():
            layer.router.reset_buffers()

    def forward(self, input_ids_BS: Tensor, token_mask_BS: Tensor | None = None) -> Tensor:
        """Logits [B, S, V] for token ids [B, S]; position s sees positions 0 to s.

        Args:
            token_mask_BS: bool, False for padding, which goes to no expert and counts in no auxiliary loss. Attention
                does not look at it: padding belongs to the right of the text. None: no padding.
        """
        config = self.config
        seq_len = input_ids_BS.shape[1]
        if seq_len > config.max_seq_len:
            require(False, "sequence length", seq_len, f"at most model.max_seq_len ({config.max_seq_len})")
        positions_S = self.positions(seq_len, input_ids_BS.device)
        cos_SH, sin_SH = rotary_tables(positions_S, config.head_dim, config.rope_theta)
        ids_BS = input_ids_BS if config.moe.routing == "hash" else None
        mask_BS, ids_BS = (None if t is None else self.moe_columns(t) for t in (token_mask_BS, ids_BS))
        x_BSD = self.embed_tokens(input_ids_BS) if self.is_first else input_ids_BS
        for layer in self.blocks:
            args = (x_BSD, cos_SH, sin_SH, mask_BS, ids_BS)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BSD = checkpoint(layer, *args, use_reentrant=False)
            else:
                x_BSD = layer(*args)
        return self.lm_head(self.norm(x_BSD)) if self.is_last else x_BSD

    def loss(self, input_ids_BS: Tensor, targets_BS: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats over the targets, computed in fp32 (fp64 for fp64 logits)."""
        logits = self(input_ids_BS).flatten(0, 1)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets_BS.flatten(), reduction=reduction)

    def num_params(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(p.numel() for p in self.parameters())

    def num_active_params(self) -> int:
        """Parameters that one token uses: all but the experts it is not routed to."""
        return self.num_params() - sum(_idle_params(m) for m in self.modules() if isinstance(m, MoE))

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of forward and backward per token, from active parameters.

        6 per active parameter (the embedding look-up costs none, the head does, tied or not; the norms, below 0.2% of
        them, are counted along), plus attention's two products, 12 * layers * heads * head_dim * seq_len, halved
        because causal attention needs half of them (Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B,
        without that halving).
        """
        config = self.config
        lookup = 0 if config.tie_embeddings else self.embed_tokens.weight.numel()
        attention = 12 * config.num_layers * config.num_heads * config.head_dim * seq_len / 2
        return 6.0 * (self.num_active_params() - lookup) + attention


def _all_positions(seq_len: int, device: torch.device) -> Tensor:
    return torch.arange(seq_len, device=device)


def _all_columns(columns_BS: Tensor) -> Tensor:
    return columns_BS


def _idle_params(layer: MoE) -> int:
    routed = sum(p.numel() for p in layer.experts.parameters())
    return routed * (layer.config.num_experts - layer.config.top_k) // layer.config.num_experts


def count_parameters(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """`num_params`, `num_active_params` and `flops_per_token` of a config, without allocating the model."""
    model = Decoder.on_meta(config)
    return {
        "num_params": model.num_params(),
        "num_active_params": model.num_active_params(),
        "flops_per_token": model.flops_per_token(seq_len),
    }
