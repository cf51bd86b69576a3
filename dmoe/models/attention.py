"""Causal grouped-query attention with rotary position embedding. Names of modules are Hugging Face's.

Legend: B batch, S sequence, U positions of the keys, N query heads, M key/value heads, H head width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.config import ModelConfig


def rotary_tables(positions_S: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [S, H/2] in fp32 for the rotary embedding (Su et al., "RoFormer", arXiv:2104.09864)."""
    exponents = torch.arange(0, head_dim, 2, device=positions_S.device, dtype=torch.float32) / head_dim
    angles_SH = positions_S.float().unsqueeze(1) * (theta**-exponents)
    return angles_SH.cos(), angles_SH.sin()


def apply_rotary(x_BSNH: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
    """Rotate each pair (i, i + H/2) of every head: the half-split layout of Hugging Face checkpoints."""
    cos, sin = cos_SH.unsqueeze(1), sin_SH.unsqueeze(1)
    x = x_BSNH if x_BSNH.dtype == torch.float64 else x_BSNH.float()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BSNH.dtype)


def causal_attention(q_BSNH: Tensor, k_BUMH: Tensor, v_BUMH: Tensor) -> Tensor:
    """[B, S, N, H]: the queries are the last S of the U positions; each sees the keys up to its own.

    N is a multiple of M. With U greater than S the mask is a tensor [S, U]; otherwise the kernel knows it.
    """
    queries, keys = q_BSNH.shape[1], k_BUMH.shape[1]
    visible_SU = None
    if queries != keys:
        visible_SU = torch.ones(queries, keys, dtype=torch.bool, device=q_BSNH.device).tril(keys - queries)
    out_BNSH = F.scaled_dot_product_attention(
        q_BSNH.transpose(1, 2),
        k_BUMH.transpose(1, 2),
        v_BUMH.transpose(1, 2),
        attn_mask=visible_SU,
        is_causal=visible_SU is None,
        enable_gqa=q_BSNH.shape[2] != k_BUMH.shape[2],
    )
    return out_BNSH.transpose(1, 2)


class Attention(nn.Module):
    """Self-attention: `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm`, `k_norm` where the config has them.

    `attend` computes it from queries, keys and values; `dmoe.parallel` replaces it where ranks share a sequence.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attend: Callable[[Tensor, Tensor, Tensor], Tensor] = causal_attention
        q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)
        per_head = config.qk_norm == "head"
        self.q_norm: nn.RMSNorm | None = None
        self.k_norm: nn.RMSNorm | None = None
        if config.qk_norm != "none":
            self.q_norm = nn.RMSNorm(config.head_dim if per_head else q_width, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim if per_head else kv_width, eps=config.norm_eps)

    def _heads(self, x_BSW: Tensor, norm: nn.RMSNorm | None) -> Tensor:
        """Split into heads, normalising before ("full") or after ("head") the split."""
        if norm is not None:  # in the dtype of its weight: torch's fused kernel wants both alike
            x_BSW = x_BSW.to(norm.weight.dtype)
        if norm is not None and self.config.qk_norm == "full":
            x_BSW = norm(x_BSW)
        x_BSNH = x_BSW.unflatten(-1, (-1, self.config.head_dim))
        return norm(x_BSNH) if norm is not None and self.config.qk_norm == "head" else x_BSNH

    def forward(self, x_BSD: Tensor, cos_SH: Tensor, sin_SH: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        v_BSMH = self._heads(self.v_proj(x_BSD), None)
        # The norm of an autocast projection comes out in fp32; attention runs in the dtype of the values.
        q_BSNH = apply_rotary(self._heads(self.q_proj(x_BSD), self.q_norm), cos_SH, sin_SH).to(v_BSMH.dtype)
        k_BSMH = apply_rotary(self._heads(self.k_proj(x_BSD), self.k_norm), cos_SH, sin_SH).to(v_BSMH.dtype)
        return self.o_proj(self.attend(q_BSNH, k_BSMH, v_BSMH).flatten(2))
