"""`Decoder`: a decoder-only language model with a dense or mixture-of-experts feed-forward network in each layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.config import ModelConfig, require
from dmoe.models.attention import Attention
from dmoe.models.latent import LatentAttention
from dmoe.models.rope import PositionTables, position_tables
from dmoe.moe import FeedForward, MoE, init_parameters, moe_layers


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); `mlp` is a `FeedForward` or a `MoE`. What is added is multiplied
    by the config's `residual_multiplier`."""

    def __init__(self, config: ModelConfig, layer: int = 0, *, moe: bool) -> None:
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = build_norm(config)
        self.self_attn = LatentAttention(config, layer) if config.latent.kv_lora_rank else Attention(config, layer)
        self.post_attention_layernorm = build_norm(config)
        self.mlp = (
            MoE(config.layer_moe_config())
            if moe
            else FeedForward(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        )

    def forward(
        self,
        x_BSD: Tensor,
        tables: PositionTables,
        valid_BS: Tensor | None = None,
        mask_BS: Tensor | None = None,
        ids_BS: Tensor | None = None,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D].

        Args:
            tables: of the positions of the tokens.
            valid_BS: bool, False for padding that attention must not see.
            mask_BS: bool, False for padding that goes to no expert.
            ids_BS: token ids, for routing "hash".
        """
        x_BSD, normed_BSD = self._attend(x_BSD, tables, valid_BS)
        if isinstance(self.mlp, MoE):
            return self._add(x_BSD, self.mlp(normed_BSD, token_mask=mask_BS, token_ids=ids_BS))
        return self._add(x_BSD, self.mlp(normed_BSD))

    def compile_around_experts(self) -> None:
        """torch.compile a layer with a mixture, but for its experts and the way of the tokens to them. Not to be copied
        then, as `MoE.leave_experts_uncompiled` says."""
        assert isinstance(self.mlp, MoE)
        self._attend = torch.compile(self._attend, fullgraph=True)  # type: ignore[method-assign]
        self.mlp.leave_experts_uncompiled()
        self.mlp.compile()

    def _attend(self, x_BSD: Tensor, tables: PositionTables, valid_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + attention(norm(x)), and its norm."""
        x_BSD = self._add(x_BSD, self.self_attn(self.input_layernorm(x_BSD), tables, valid_BS))
        return x_BSD, self.post_attention_layernorm(x_BSD)

    def _add(self, x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        return x_BSD + (y_BSD if self.residual_multiplier == 1 else y_BSD * self.residual_multiplier)


def build_norm(config: ModelConfig) -> nn.RMSNorm | nn.LayerNorm:
    """A norm over the width of the residual stream."""
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(config.hidden_size, eps=config.norm_eps)


class Decoder(nn.Module):
    """Decoder-only transformer. Parameter names follow Hugging Face's Llama family, without the prefix `model.`.

    Build large models with `Decoder.on_meta(config)`, then `to_empty(device=...)` and `init_weights` or a checkpoint.

    `dmoe.parallel` may leave it a part of the model: some layers, not `is_first` (hidden states come in) or not
    `is_last` (hidden states go out). `positions(n, device)` are the positions of the queries of a rank that is
    given n tokens, `whole_length(n)` is the length of the sequence that they are of, and `moe_columns` picks from
    [B, S] the columns that its MoE layers see.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.is_first = self.is_last = True
        self.positions: Callable[[int, torch.device], Tensor] = _all_positions
        self.whole_length: Callable[[int], int] = _own_length
        self.moe_columns: Callable[[Tensor], Tensor] = _all_columns
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        mixtures = set(config.moe_layers())
        self.layers = nn.ModuleList(DecoderLayer(config, i, moe=i in mixtures) for i in range(config.num_layers))
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mlp, MoE):
                layer.mlp.router.hash_seed = i
        self.norm = build_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
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

    def forward(
        self, input_ids_BS: Tensor, attention_mask: Tensor | None = None, *, right_padded: bool = False
    ) -> Tensor:
        """Logits [B, S, V] for token ids [B, S]; position s sees positions 0 to s, as far as its layer lets it.

        Args:
            attention_mask: [B, S], bool or 0 and 1: 0 for padding, anywhere. Its ids may be anything; no token sees it,
                it goes to no expert and counts in no auxiliary loss. Its own logits are finite and mean nothing.
                Positions count it: they are 0 to S - 1. None: no padding.
            right_padded: a promise that padding is on the right of every sequence alone. Causal attention then needs no
                mask, and keeps its fastest kernel.

        Raises:
            ConfigError: a sequence longer than `max_seq_len`, or a mask of another shape than the ids.
        """
        config = self.config
        seq_len = self.whole_length(input_ids_BS.shape[1])
        if seq_len > config.max_seq_len:
            require(False, "sequence length", seq_len, f"at most model.max_seq_len ({config.max_seq_len})")
        tables = position_tables(self.positions(input_ids_BS.shape[1], input_ids_BS.device), config, seq_len)
        mask_BS = attention_mask
        if mask_BS is not None:
            mask_BS = _bool_mask(mask_BS, input_ids_BS, any_length=not self.is_first)
        x_BSD = self._embed(input_ids_BS, mask_BS) if self.is_first else input_ids_BS
        valid_BS = None if right_padded else mask_BS
        ids_BS = input_ids_BS if config.moe.routing == "hash" else None
        mask_BS, ids_BS = (None if t is None else self.moe_columns(t) for t in (mask_BS, ids_BS))
        for layer in self.blocks:
            args = (x_BSD, tables, valid_BS, mask_BS, ids_BS)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BSD = checkpoint(layer, *args, use_reentrant=False)
            else:
                x_BSD = layer(*args)
        return self._logits(x_BSD) if self.is_last else x_BSD

    def _embed(self, input_ids_BS: Tensor, mask_BS: Tensor | None) -> Tensor:
        """Embeddings, 0 for padding: what it holds must not reach a product, where 0 * NaN is NaN."""
        ids_BS = input_ids_BS if mask_BS is None else input_ids_BS.masked_fill(~mask_BS, 0)
        x_BSD = self.embed_tokens(ids_BS)
        if mask_BS is not None:
            columns_BS = mask_BS if x_BSD.shape[1] == mask_BS.shape[1] else self.moe_columns(mask_BS)
            x_BSD = x_BSD.masked_fill(~columns_BS.unsqueeze(-1), 0)
        factor = self.config.embedding_multiplier
        return x_BSD if factor == 1 else x_BSD * factor

    def _logits(self, x_BSD: Tensor) -> Tensor:
        logits_BSV = self.lm_head(self.norm(x_BSD))
        divisor = self.config.logits_divisor
        return logits_BSV if divisor == 1 else logits_BSV / divisor

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
        them, are counted along), plus attention's two products, in each layer 6 * heads * (width of a key + width of a
        value) * keys that a query sees on average, which is seq_len / 2 without windows (Chowdhery et al., "PaLM",
        arXiv:2204.02311, appendix B, with all seq_len keys).
        """
        config = self.config
        lookup = 0 if config.tie_embeddings else self.embed_tokens.weight.numel()
        widths = config.num_heads * (config.query_head_dim + config.value_head_dim)
        keys = sum(attended_keys(config, layer, seq_len) for layer in range(config.num_layers))
        return 6.0 * (self.num_active_params() - lookup) + 6 * widths * keys


def _all_positions(seq_len: int, device: torch.device) -> Tensor:
    return torch.arange(seq_len, device=device)


def _own_length(seq_len: int) -> int:
    return seq_len


def _all_columns(columns_BS: Tensor) -> Tensor:
    return columns_BS


def _bool_mask(mask_BS: Tensor, ids_BS: Tensor, *, any_length: bool) -> Tensor:
    """An attention mask as bool. Hidden states of a later stage may hold a part of its columns."""
    if mask_BS.dim() != 2 or len(mask_BS) != len(ids_BS) or not (any_length or mask_BS.shape == ids_BS.shape):
        require(False, "attention_mask shape", tuple(mask_BS.shape), f"{tuple(ids_BS.shape[:2])}, that of the ids")
    return mask_BS if mask_BS.dtype == torch.bool else mask_BS != 0


def _idle_params(layer: MoE) -> int:
    routed = sum(p.numel() for p in layer.experts.parameters())
    return routed * (layer.config.num_experts - layer.config.top_k) // layer.config.num_experts


def attended_keys(config: ModelConfig, layer: int, seq_len: int) -> float:
    """Keys that a query of a layer sees on average over a sequence; n / 2 of n that all see one another causally."""
    kind, window = config.attention_kind(layer), min(config.attention_window or seq_len, seq_len)
    if kind == "sliding":
        return window - window**2 / (2 * seq_len)
    if kind == "chunked":
        whole, rest = divmod(seq_len, window)
        return (whole * window**2 + rest**2) / (2 * seq_len)
    return seq_len / 2


def count_parameters(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """`num_params`, `num_active_params` and `flops_per_token` of a config, without allocating the model."""
    model = Decoder.on_meta(config)
    return {
        "num_params": model.num_params(),
        "num_active_params": model.num_active_params(),
        "flops_per_token": model.flops_per_token(seq_len),
    }
