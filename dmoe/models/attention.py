"""Causal grouped-query attention with rotary position embedding. Names of modules are Hugging Face's.

Legend: B batch, S sequence, U positions of the keys, N query heads, M key/value heads, H head width, V width of a value
head, D model width, P rotated pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import ModelConfig
from dmoe.models.masks import spans, visible_keys
from dmoe.models.rope import PositionTables, apply_rotary
from dmoe.moe.sharded import local

Attend = Callable[..., Tensor]
"""`causal_attention`, or the same over ranks."""


def causal_attention(
    q_BSNH: Tensor,
    k_BUMH: Tensor,
    v_BUMV: Tensor,
    *,
    scale: float | None = None,
    window: int = 0,
    chunk: int = 0,
    sinks_N: Tensor | None = None,
    valid_BU: Tensor | None = None,
) -> Tensor:
    """[B, S, N, V]: the queries are the last S of the U positions; each sees the keys up to its own.

    N is a multiple of M. Masks are made only where the kernel's own (U = S, no window, no padding) does not do, and
    with a window or chunk only of the keys that it lets through.

    Args:
        scale: factor on query-key products; None: 1 / sqrt(H).
        window: keys that a query sees, its own included. 0: all.
        chunk: queries see keys of their own chunk of so many positions alone. 0: all.
        sinks_N: a logit a head that takes part in the softmax and has no value; its gradient is computed.
        valid_BU: bool, False for padding, which may hold anything and is seen by no other position. Chunks are counted
            from the first valid position.
    """
    queries, keys = q_BSNH.shape[1], k_BUMH.shape[1]
    window, chunk = (0 if size >= keys else size for size in (window, chunk))
    if valid_BU is not None:
        padding = ~valid_BU[:, :, None, None]
        k, v = k_BUMH.masked_fill(padding, 0), v_BUMV.masked_fill(padding, 0)
        visible_BSU = visible_keys(queries, keys, q_BSNH.device, window=window, chunk=chunk, valid_BU=valid_BU)
        return _attend(q_BSNH, k, v, visible_BSU, scale, sinks_N)
    outputs = []
    for start, stop, first in spans(queries, keys, window=window, chunk=chunk):
        end = keys - queries + stop
        visible_SU = visible_keys(
            stop - start, end - first, q_BSNH.device, window=window if window < end - first else 0
        )
        k, v = k_BUMH[:, first:end], v_BUMV[:, first:end]
        outputs.append(_attend(q_BSNH[:, start:stop], k, v, visible_SU, scale, sinks_N))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None, sinks_N: Tensor | None
) -> Tensor:
    """Attention by a mask [S, U] or [B, S, U]; None: causal, S = U."""
    if sinks_N is not None:
        return _attend_with_sinks(q, k, v, visible, scale, sinks_N)
    group = q.shape[2] // k.shape[2]
    if visible is not None and group > 1:  # GPU kernels know masks or shared keys, not both
        k, v, group = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2), 1
    out_BNSV = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=visible.unsqueeze(1) if visible is not None and visible.dim() == 3 else visible,
        is_causal=visible is None,
        scale=scale,
        enable_gqa=group > 1,
    )
    return out_BNSV.transpose(1, 2)


def _attend_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None, sinks_N: Tensor
) -> Tensor:
    """A sink is a key before all others with value 0, so that every kernel of attention knows it, backward too.

    Queries hold sink / scale in dimensions in which that key is 1 and others are 0. There are two such dimensions, the
    second for what rounding to the dtype of the queries takes off; six more keep the width a multiple of eight.
    """
    batch, queries, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    sinks_N = local(sinks_N)
    sinks_N = (sinks_N if q.dtype == torch.float64 else sinks_N.float()) / scale
    rounded_N = sinks_N.to(q.dtype)
    parts_N2 = torch.stack([rounded_N, (sinks_N - rounded_N).to(q.dtype)], dim=-1)
    q = torch.cat([q, F.pad(parts_N2, (0, 6)).expand(batch, queries, heads, 8)], dim=-1)
    sink_key = F.pad(k.new_ones(2), (width, 6)).expand(batch, 1, k.shape[2], width + 8)
    k = torch.cat([sink_key, F.pad(k, (0, 8))], dim=1)
    v = F.pad(v, (0, 8, 0, 0, 1, 0))
    if visible is None:  # a query at the sink's position, so that both lengths stay equal
        return _attend(F.pad(q, (0, 0, 0, 0, 1, 0)), k, v, None, scale, None)[:, 1:, :, :-8]
    return _attend(q, k, v, F.pad(visible, (1, 0), value=True), scale, None)[..., :-8]


class Attention(nn.Module):
    """Self-attention of one layer: `q_proj`, `k_proj`, `v_proj`, `o_proj`, and where the config has them `q_norm`,
    `k_norm` and `sinks`.

    `attend` computes it from queries, keys and values; `dmoe.parallel` replaces it where ranks share a sequence.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.attend: Attend = causal_attention
        self.options = attention_options(config, layer)
        self.has_rope = config.has_rope(layer)
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=config.attention_out_bias)
        self.q_norm: nn.RMSNorm | None = None
        self.k_norm: nn.RMSNorm | None = None
        if config.qk_norm in ("head", "full"):
            per_head = config.qk_norm == "head"
            self.q_norm = nn.RMSNorm(config.head_dim if per_head else q_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim if per_head else kv_width, eps=config.norm_eps)
        self.sinks = nn.Parameter(torch.empty(config.num_heads)) if config.attention_sinks else None
        if self.sinks is not None and not self.sinks.is_meta:
            nn.init.normal_(self.sinks, std=config.init_std)

    def _heads(self, x_BSW: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Split into heads, normalising before ("full") or after ("head") the split; then clamp."""
        if norm is not None:  # in the dtype of its weight: torch's fused kernel wants both alike
            x_BSW = x_BSW.to(norm.weight.dtype)
        if norm is not None and self.config.qk_norm == "full":
            x_BSW = norm(x_BSW)
        x_BSNH = x_BSW.unflatten(-1, (-1, self.config.head_dim))
        x_BSNH = norm(x_BSNH) if norm is not None and self.config.qk_norm == "head" else x_BSNH
        bound = self.config.clip_qkv
        return x_BSNH.clamp(-bound, bound) if bound else x_BSNH

    def _placed(self, x_BSNH: Tensor, tables: PositionTables) -> Tensor:
        """Rotated, in a layer that does, and then normalised with qk_norm "l2"."""
        if not self.has_rope:
            return x_BSNH
        x_BSNH = apply_rotary(x_BSNH, tables.cos_SP, tables.sin_SP, interleaved=self.config.rope.interleaved)
        if self.config.qk_norm != "l2":
            return x_BSNH
        wide = x_BSNH if x_BSNH.dtype == torch.float64 else x_BSNH.float()
        return F.rms_norm(wide, wide.shape[-1:], eps=self.config.norm_eps)

    def forward(self, x_BSD: Tensor, tables: PositionTables, valid_BS: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D].

        Args:
            tables: of the positions of the S tokens.
            valid_BS: bool, False for padding. None: no padding, or on the right only, where no valid query sees it.
        """
        v_BSMH = self._heads(self.v_proj(x_BSD), None)
        q_BSNH = self._placed(self._heads(self.q_proj(x_BSD), self.q_norm), tables)
        k_BSMH = self._placed(self._heads(self.k_proj(x_BSD), self.k_norm), tables)
        if tables.temperature_S is not None and not self.has_rope:
            q_BSNH = q_BSNH * tables.temperature_S[:, None, None]
        # The norm of an autocast projection comes out in fp32; attention runs in the dtype of the values.
        q_BSNH, k_BSMH = q_BSNH.to(v_BSMH.dtype), k_BSMH.to(v_BSMH.dtype)
        out = self.attend(q_BSNH, k_BSMH, v_BSMH, sinks_N=self.sinks, valid_BU=valid_BS, **self.options)
        return self.o_proj(out.flatten(2))


def attention_options(config: ModelConfig, layer: int) -> dict[str, Any]:
    """The options of `causal_attention` that the config decides for a layer."""
    kind = config.attention_kind(layer)
    return {
        "scale": config.attention_scale or config.query_head_dim**-0.5,
        "window": config.attention_window if kind == "sliding" else 0,
        "chunk": config.attention_window if kind == "chunked" else 0,
    }
