"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1). Names of modules are Hugging Face's.

Legend: as `dmoe.models.attention`; C the latent's width, O and R dimensions of a head without and with a position.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config import ModelConfig
from dmoe.models.attention import Attend, attention_options, causal_attention
from dmoe.models.rope import PositionTables, apply_rotary, yarn_mscale

LATENT_EPS = 1e-6
"""Epsilon of the norms of latents; DeepSeek's, whatever that of the others."""


class LatentAttention(nn.Module):
    """Self-attention whose keys and values are projected from a latent of the token, and queries too if the config says
    so: `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`, `o_proj`, and `q_proj` or `q_a_proj`, `q_a_layernorm`,
    `q_b_proj`. The R rotated dimensions of a key are the same in all heads. Training computes whole keys and values.

    Rows of `q_proj` and `q_b_proj` are, of each head, O and then R; those of `kv_b_proj` O and then the value's.
    """

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.config = config
        self.attend: Attend = causal_attention
        self.options = attention_options(config, layer)
        self.has_rope = config.has_rope(layer)
        latent, rope = config.latent, config.rope
        if rope.scaling == "yarn" and rope.mscale_all_dim and not config.attention_scale:
            self.options["scale"] *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
        D, C, N = config.hidden_size, latent.kv_lora_rank, config.num_heads
        q_width = N * config.query_head_dim
        if latent.q_lora_rank:
            self.q_a_proj = nn.Linear(D, latent.q_lora_rank, bias=config.qkv_bias)
            self.q_a_layernorm = nn.RMSNorm(latent.q_lora_rank, eps=LATENT_EPS)
            self.q_b_proj = nn.Linear(latent.q_lora_rank, q_width, bias=False)
        else:
            self.q_proj = nn.Linear(D, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, C + latent.qk_rope_head_dim, bias=config.qkv_bias)
        self.kv_a_layernorm = nn.RMSNorm(C, eps=LATENT_EPS)
        self.kv_b_proj = nn.Linear(C, N * (latent.qk_nope_head_dim + latent.v_head_dim), bias=False)
        self.o_proj = nn.Linear(N * latent.v_head_dim, D, bias=config.attention_out_bias)

    def forward(self, x_BSD: Tensor, tables: PositionTables, valid_BS: Tensor | None = None) -> Tensor:
        """[B, S, D] -> [B, S, D]; arguments as of `dmoe.models.attention.Attention`."""
        latent, heads = self.config.latent, self.config.num_heads
        plain, rotated = latent.qk_nope_head_dim, latent.qk_rope_head_dim
        q_BSNH = self._queries(x_BSD).unflatten(-1, (heads, -1))
        compressed_BSC, k_BSR = self.kv_a_proj_with_mqa(x_BSD).split([latent.kv_lora_rank, rotated], dim=-1)
        kv_BSN = self.kv_b_proj(_normed(compressed_BSC, self.kv_a_layernorm)).unflatten(-1, (heads, -1))
        k_BSNO, v_BSNV = kv_BSN.split([plain, latent.v_head_dim], dim=-1)
        q_BSNO, q_BSNR = q_BSNH.split([plain, rotated], dim=-1)
        k_BSNR = self._placed(k_BSR.unsqueeze(2), tables).expand(-1, -1, heads, -1)
        q_BSNH = torch.cat([q_BSNO, self._placed(q_BSNR, tables)], dim=-1)
        if tables.temperature_S is not None and not self.has_rope:
            q_BSNH = q_BSNH * tables.temperature_S[:, None, None]
        k_BSNH = torch.cat([k_BSNO, k_BSNR], dim=-1)
        out_BSNV = self.attend(q_BSNH.to(v_BSNV.dtype), k_BSNH, v_BSNV, valid_BU=valid_BS, **self.options)
        return self.o_proj(out_BSNV.flatten(2))

    def _queries(self, x_BSD: Tensor) -> Tensor:
        if self.config.latent.q_lora_rank:
            return self.q_b_proj(_normed(self.q_a_proj(x_BSD), self.q_a_layernorm))
        return self.q_proj(x_BSD)

    def _placed(self, x_BSNR: Tensor, tables: PositionTables) -> Tensor:
        if not self.has_rope:
            return x_BSNR
        return apply_rotary(x_BSNR, tables.cos_SP, tables.sin_SP, interleaved=self.config.rope.interleaved)


def _normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return norm(x.to(norm.weight.dtype))  # autocast gives another dtype than the fused kernel wants
