"""The maths of MegaBlocks' layers as loops over tokens and experts in plain torch, and data on which fp32 is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dmoe.compat.megablocks.layers.arguments import Arguments

Activation = Callable[[Tensor], Tensor]
OFF = -1024.0  # a logit whose softmax is 0 in fp32


class Result(NamedTuple):
    out: Tensor
    scores: Tensor
    logits: Tensor
    counts: Tensor


def arguments(**kwargs) -> Arguments:
    return Arguments(**{"fp16": False, "device": "cpu", "hidden_size": 12, "ffn_hidden_size": 8, **kwargs})


def expert_weights(w: dict[str, Tensor], dropless: bool, num_experts: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """w1 and v1 as [E, F, D], w2 as [E, F, D], from either layout."""
    w1, w2, v1 = w["experts.mlp.w1"], w["experts.mlp.w2"], w.get("experts.mlp.v1")
    if not dropless:
        return w1.transpose(1, 2), None, w2
    width = w1.shape[1]
    return (
        w1.view(num_experts, -1, width),
        None if v1 is None else v1.view(num_experts, -1, width),
        w2.view(num_experts, -1, width),
    )


def route(logits: Tensor, args: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    scores = logits.softmax(dim=-1)
    k = args.moe_top_k
    weights, ids = scores.max(dim=-1, keepdim=True) if k == 1 else scores.topk(k, dim=-1)
    if args.moe_normalize_expert_weights:
        p = args.moe_normalize_expert_weights
        weights = weights / (weights**p).sum(dim=-1, keepdim=True) ** (1 / p)
    return scores, weights, ids


def forward(
    w: dict[str, Tensor], x: Tensor, args: Arguments, act: Callable[[Tensor], Tensor], dropless: bool
) -> Result:
    """Everything added: experts, bias, shared expert."""
    experts, k, width = args.moe_num_experts, args.moe_top_k, x.shape[-1]
    tokens = x.reshape(-1, width)
    logits = tokens @ w["router.layer.weight"].t()
    scores, weights, ids = route(logits, args)
    w1, v1, w2 = expert_weights(w, dropless, experts)
    capacity = 0 if dropless else int(args.moe_capacity_factor * (k * len(tokens) / experts))
    counts = [0] * experts
    rows = []
    for t in range(len(tokens)):
        row = torch.zeros(width, dtype=x.dtype)
        for j in range(k):
            e = int(ids[t, j])
            counts[e] += 1
            if capacity and counts[e] > capacity:
                continue
            h = act(w1[e] @ tokens[t])
            h = h if v1 is None else h * (v1[e] @ tokens[t])
            row = row + weights[t, j] * (h @ w2[e])
        rows.append(row)
    out = torch.stack(rows) if rows else tokens * 0
    if "experts.bias" in w:
        out = out + w["experts.bias"]
    if args.shared_expert:
        out = combine(shared(w, tokens, act), out, args)
    return Result(out.reshape(x.shape), scores, logits, torch.tensor(counts, dtype=torch.int32))


def shared(w: dict[str, Tensor], tokens: Tensor, act: Activation) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        y = x @ w[f"shared_expert.{name}.weight"].t()
        bias = w.get(f"shared_expert.{name}.bias")
        return y if bias is None else y + bias

    up = linear("up_proj", tokens)
    gated = "shared_expert.gate_proj.weight" in w
    return linear("down_proj", act(linear("gate_proj", tokens)) * up if gated else act(up))


def combine(shared_out: Tensor, out: Tensor, args: Arguments) -> Tensor:
    if not args.shared_expert_weighted_sum:
        return shared_out + out
    n = args.moe_top_k + 1
    return shared_out / n + out * (args.moe_top_k / n)


def parameters_of(layer: nn.Module) -> dict[str, Tensor]:
    """Copies to differentiate with respect to."""
    return {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in layer.named_parameters()}


def make_exact(layer: nn.Module, seed: int) -> None:
    """Small integers everywhere; a router that turns feature e into 0 or -1024 for the logit of expert e."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randint(-2, 3, p.shape, generator=generator))
        weight = layer.get_parameter("router.layer.weight")
        weight.zero_().fill_diagonal_(OFF)


def exact_input(shape: tuple[int, ...], num_experts: int, seed: int) -> Tensor:
    """Small integers. Feature e is 0 if expert e shares in a token's softmax, as 1, 2 or 4 do, and 1 if not."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, shape, generator=generator).float()
    rows = x.view(-1, shape[-1])
    for row in rows:
        sizes = [n for n in (1, 2, 4) if n <= num_experts]
        active = sizes[int(torch.randint(len(sizes), (), generator=generator))]
        row[:num_experts] = 1
        # Few experts get many tokens, and the last none.
        popular = torch.rand(num_experts, generator=generator) + torch.arange(num_experts, 0, -1) / num_experts
        row[popular.topk(active).indices] = 0
    return x
