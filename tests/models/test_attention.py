"""Rotary embedding as complex multiplication, and attention as an explicit masked softmax in fp64."""

import math

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor

from dmoe.config import ModelConfig
from dmoe.models import Attention
from dmoe.models.rope import apply_rotary, position_tables


def rotate(x_BSNH: Tensor, theta: float) -> Tensor:
    """Pair (i, i + H/2) is a complex number, turned by position * theta^(-2i/H)."""
    half = x_BSNH.shape[-1] // 2
    pairs = torch.complex(x_BSNH[..., :half].double(), x_BSNH[..., half:].double())
    frequency = theta ** (-2 * torch.arange(half, dtype=torch.float64) / (2 * half))
    angle_SH = torch.arange(x_BSNH.shape[1], dtype=torch.float64).unsqueeze(1) * frequency
    turned = pairs * torch.polar(torch.ones_like(angle_SH), angle_SH).unsqueeze(1)
    return torch.cat([turned.real, turned.imag], dim=-1)


@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rotary(theta: float) -> None:
    x = torch.randn(2, 300, 3, 8)
    cos, sin, _ = position_tables(torch.arange(300), ModelConfig(head_dim=8, rope_theta=theta))
    assert relative_error(apply_rotary(x, cos, sin), rotate(x, theta)) <= 1e-5
    assert apply_rotary(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(kv_heads: int, qk_norm: str) -> None:
    config = ModelConfig(
        hidden_size=24, num_heads=4, num_kv_heads=kv_heads, head_dim=8, qk_norm=qk_norm, norm_eps=1e-5, rope_theta=100.0
    )
    attention = Attention(config)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.4)
    x = torch.randn(2, 11, 24)

    def heads(name: str) -> Tensor:
        y = x.double() @ getattr(attention, f"{name}_proj").weight.double().T
        norm = getattr(attention, f"{name}_norm", None)
        if norm is not None and qk_norm == "full":
            y = rms(y, norm.weight)
        y = y.view(2, 11, -1, 8)
        return rms(y, norm.weight) if norm is not None and qk_norm == "head" else y

    q, k, v = rotate(heads("q"), 100.0), rotate(heads("k"), 100.0), heads("v")
    k, v = (t.repeat_interleave(4 // kv_heads, dim=2) for t in (k, v))
    scores = torch.einsum("bsnh,btnh->bnst", q, k) / math.sqrt(8)
    weights = torch.exp(scores) * torch.ones(11, 11, dtype=torch.float64).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.einsum("bnst,btnh->bsnh", weights, v).flatten(2)
    want = out @ attention.o_proj.weight.double().T
    got = attention(x, position_tables(torch.arange(11), config))
    assert relative_error(got.detach(), want.detach()) <= 1e-5
