"""Upcycling keeps the function of a dense model where it says so, and is as far off as it says elsewhere."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from upcycle_cases import dense_config, dense_model, token_ids

from dmoe.checkpoint.upcycle import UpcyclePlan, preservation, upcycle_model
from dmoe.checkpoint.upcycle.compare import compare, text_logits
from dmoe.config import ModelConfig
from dmoe.models import Decoder
from dmoe.moe import Experts, FeedForward, MoE, moe_layers


@torch.no_grad()
def logit_error(dense: Decoder, upcycled: Decoder) -> float:
    """Largest difference of logits, relative to their size."""
    ids = token_ids()
    wanted = dense(ids)
    return ((upcycled(ids) - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_copies_and_parts_keep_the_function_for_every_shape(score_function: str) -> None:
    dense = dense_model(num_layers=1)
    shapes = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (6, 1), (6, 4), (6, 6)]
    grid = [(E, k, G) for E, k in shapes for G in (1, 2, 3, 4)]
    for E, k, G in grid if score_function == "softmax" else grid[::5]:
        plan = UpcyclePlan(num_experts=E, top_k=k, granularity=G, score_function=score_function, router_std=0.5)
        upcycled = upcycle_model(dense, plan)
        moe = upcycled.config.moe
        assert (moe.num_experts, moe.top_k, moe.intermediate_size) == (E * G, k * G, 24 // G)
        assert logit_error(dense, upcycled) < 1e-12, (E, k, G)
        kind = "rounding" if G == 3 else "exact"  # 3 is no power of two
        assert preservation(plan, dense.config).kind == kind, (E, k, G)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_function_is_kept_to_the_rounding_of_the_dtype(dtype: torch.dtype) -> None:
    dense = dense_model(dtype)
    upcycled = upcycle_model(dense, UpcyclePlan(num_experts=6, top_k=2, granularity=4))
    assert {p.dtype for p in upcycled.parameters()} == {dtype}
    assert logit_error(dense, upcycled) < (3e-6 if dtype == torch.float32 else 0.05)


OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weights of a softmax that do not add up, all chosen": ({"norm_topk_prob": False, "top_k": 4}, {}),
    "zero router, plain softmax": ({"norm_topk_prob": False, "router_init": "zero"}, {}),
    "zero router, plain sigmoid": ({"norm_topk_prob": False, "router_init": "zero", "score_function": "sigmoid"}, {}),
    "zero router, plain sqrtsoftplus, all parts": (
        {
            "norm_topk_prob": False, "router_init": "zero", "score_function": "sqrtsoftplus", "top_k": 4,
            "granularity": 2,
        },
        {},
    ),
    "independent rows of one part each": ({"router_init": "independent"}, {}),
    "shuffled": ({"shuffle": True}, {}),
    "shuffled parts": ({"shuffle": True, "granularity": 6}, {}),
    "no channel dropped": ({"method": "drop", "drop_ratio": 0.01, "granularity": 2}, {}),
    "no noise": ({"method": "noise", "noise_std": 0.0}, {}),
    "shared part": ({"shared_size": 8, "granularity": 4}, {}),
    "shared part, shuffled": ({"shared_size": 4, "granularity": 5, "shuffle": True}, {}),
    "shared copy": ({"shared_size": 24, "granularity": 2}, {}),
    "gated shared part": ({"shared_size": 6, "granularity": 3, "shared_gate": True}, {}),
    "gated shared copy": ({"shared_size": 24, "shared_gate": True}, {}),
    "every second layer": ({"layers": "every-2"}, {}),
    "all but the first": ({"layers": "after-1"}, {}),
    "pattern": ({"layers": "1,0,1"}, {}),
    "tied head": ({}, {"tie_embeddings": True}),
    "biases": ({"granularity": 4}, {"mlp_bias": True}),
    "biases and a shared part": ({"granularity": 2, "shared_size": 8}, {"mlp_bias": True}),
    "biases and a gated shared copy": (
        {"granularity": 2, "shared_size": 24, "shared_gate": True}, {"mlp_bias": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_plans_that_keep_the_function(case: str) -> None:
    plan_fields, model_fields = OTHERS[case]
    dense = dense_model(**({"num_layers": 3} | model_fields))
    plan = UpcyclePlan(**({"num_experts": 4, "top_k": 2, "router_std": 0.5} | plan_fields))
    assert preservation(plan, dense.config).kind != "no"
    upcycled = upcycle_model(dense, plan)
    assert moe_layers(upcycled)
    assert logit_error(dense, upcycled) < 1e-12


def test_stored_weights_are_the_dense_bits_times_a_power_of_two() -> None:
    dense = dense_model(torch.bfloat16)
    plan = UpcyclePlan(num_experts=3, top_k=1, granularity=4, shared_size=24)
    assert preservation(plan, dense.config).kind == "exact"
    network, layer = dense.layers[0].mlp, upcycle_model(dense, plan).layers[0].mlp
    for expert in range(12):
        own = slice(6 * (expert % 4), 6 * (expert % 4) + 6)
        gate, up = layer.experts.gate_up_proj[expert].chunk(2)
        assert torch.equal(gate, network.gate_proj.weight[own])
        assert torch.equal(up, network.up_proj.weight[own])
        assert torch.equal(layer.experts.down_proj[expert], network.down_proj.weight[:, own] * 2)
    assert torch.equal(layer.shared_experts.gate_proj.weight, network.gate_proj.weight)
    assert torch.equal(layer.shared_experts.down_proj.weight, network.down_proj.weight / 2)
    assert torch.equal(layer.router.weight, layer.router.weight[::4].repeat_interleave(4, dim=0))
    assert layer.router.weight[::4].unique(dim=0).shape[0] == 3


def test_statement_names_the_dtype_that_rounds() -> None:
    plan = UpcyclePlan(num_experts=2, top_k=1)
    statement = preservation(plan, dense_config(), torch.bfloat16)
    assert statement.kind == "rounding"
    assert "bfloat16" in statement.text


def wide_layers(plan: UpcyclePlan) -> tuple[FeedForward, MoE, Tensor]:
    """A random dense network whose channels are uncorrelated, its upcycled layer, and inputs of RMS 1."""
    dense = dense_model(torch.float32, num_layers=1, hidden_size=64, intermediate_size=240)
    network = dense.layers[0].mlp
    for matrix in network.parameters():
        torch.nn.init.normal_(matrix, std=0.5 / math.sqrt(matrix.shape[1]))
    upcycled = upcycle_model(dense, plan)
    x = torch.randn(4000, 64)
    return network, upcycled.layers[0].mlp, x / x.square().mean(dim=1, keepdim=True).sqrt()


FURTHER_OFF: dict[str, dict[str, Any]] = {
    "drop": {"method": "drop", "drop_ratio": 0.5},
    "drop a little": {"method": "drop", "drop_ratio": 0.1, "top_k": 1},
    "drop, all chosen, parts": {"method": "drop", "drop_ratio": 0.4, "top_k": 4, "granularity": 3},
    "drop beside a shared part": {"method": "drop", "drop_ratio": 0.5, "shared_size": 120},
    "drop beside a shared copy": {"method": "drop", "drop_ratio": 0.5, "shared_size": 240},
    "shuffle and drop": {"method": "drop", "drop_ratio": 0.5, "granularity": 2, "shuffle": True},
    "noise": {"method": "noise", "noise_std": 0.1},
    "much noise": {"method": "noise", "noise_std": 0.5, "top_k": 1},
    "independent parts": {"router_init": "independent", "granularity": 4},
    "independent parts, all chosen": {"router_init": "independent", "granularity": 4, "top_k": 4},
    "plain softmax": {"norm_topk_prob": False},
    "plain sigmoid, parts": {"norm_topk_prob": False, "score_function": "sigmoid", "granularity": 2},
    "plain softmax beside a shared copy": {"norm_topk_prob": False, "shared_size": 240},
}


@pytest.mark.parametrize("case", FURTHER_OFF)
@torch.no_grad()
def test_expected_deviation_is_what_a_random_layer_shows(case: str) -> None:
    plan = UpcyclePlan(**({"num_experts": 4, "top_k": 2, "router_std": 0.06} | FURTHER_OFF[case]))
    network, layer, x = wide_layers(plan)
    statement = preservation(plan, dense_config(num_layers=1, hidden_size=64, intermediate_size=240))
    assert statement.kind == "no"
    wanted = network(x)
    measured = ((layer(x) - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert statement.deviation == pytest.approx(measured, rel=0.12)
    assert f"{statement.deviation:.1%}" in statement.text


def test_deviation_is_zero_where_the_function_is_kept() -> None:
    """The estimate by random logits and the rules that decide on "exact" agree."""
    from dmoe.checkpoint.upcycle.deviation import expected_deviation

    config = dense_config()
    for E, k, G in [(1, 1, 2), (2, 1, 1), (3, 3, 1), (3, 2, 1), (3, 2, 4), (6, 6, 3)]:
        for norm, router in itertools.product((True, False), ("normal", "zero", "independent")):
            if router == "zero" and G > 1 and k < E:
                continue
            plan = UpcyclePlan(num_experts=E, top_k=k, granularity=G, norm_topk_prob=norm, router_init=router)
            exact = preservation(plan, config).kind != "no"
            assert exact == (expected_deviation(plan, config) < 1e-9), plan


def train(model: Decoder, steps: int = 12) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = token_ids(8, 17)
    losses = []
    for _ in range(steps):
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def spread(weight_EHD: Tensor) -> float:
    """Smallest difference between two experts, relative to their size."""
    flat = weight_EHD.detach().flatten(1)
    distances = torch.pdist(flat)
    return (distances.min() / flat.norm(dim=1).mean()).item()


@pytest.mark.parametrize("granularity", [1, 2])
def test_copies_become_different_experts_when_trained(granularity: int) -> None:
    dense = dense_model(torch.float32)
    plan = UpcyclePlan(num_experts=4, top_k=2, granularity=granularity, aux_loss_coef=0.0, z_loss_coef=0.0)
    model = upcycle_model(dense, plan)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first_parts = [layer.experts.gate_up_proj[::granularity] for layer in moe_layers(model).values()]
    assert all(spread(w) == 0.0 for w in first_parts)
    losses = train(model)
    assert losses[-1] < 0.9 * losses[0]
    assert losses[0] == pytest.approx(train(dense, 1)[0], rel=1e-5)
    for layer in moe_layers(model).values():
        assert spread(layer.experts.gate_up_proj[::granularity]) > 1e-3
        assert spread(layer.experts.down_proj[::granularity]) > 1e-3
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_zero_router_and_one_expert_are_warned_about() -> None:
    config = dense_config()
    zero = preservation(UpcyclePlan(num_experts=4, top_k=2, router_init="zero"), config)
    assert zero.kind == "exact"
    assert len(zero.warnings) == 2
    assert len(preservation(UpcyclePlan(num_experts=4, top_k=4, router_init="zero"), config).warnings) == 1
    assert len(preservation(UpcyclePlan(num_experts=4, top_k=1), config).warnings) == 1
    assert preservation(UpcyclePlan(num_experts=4, top_k=2), config).warnings == ()
    # The warning is true: copies that are chosen together do not part.
    model = upcycle_model(dense_model(torch.float32), UpcyclePlan(num_experts=4, top_k=4, router_init="zero"))
    train(model, 3)
    assert spread(next(iter(moe_layers(model).values())).experts.down_proj) < 1e-6


def test_comparison_is_that_of_formulas_in_fp64() -> None:
    dense, ids = dense_model(torch.float32), token_ids(3, 8)
    plan = UpcyclePlan(num_experts=3, top_k=2, method="noise", noise_std=0.5)
    upcycled = upcycle_model(dense, plan)
    result = compare(text_logits(dense, ids), text_logits(upcycled, ids), ids)
    with torch.no_grad():
        p, q = (model.double()(ids) for model in (dense, upcycled))
    assert result.tokens == 24
    assert result.max_difference == pytest.approx((p - q).abs().max().item(), rel=1e-4)
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum").item() / 24
    assert result.kl == pytest.approx(kl, rel=1e-4)
    assert result.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    for logits, value in ((p, result.reference_perplexity), (q, result.perplexity)):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert value == pytest.approx(loss.exp().item(), rel=1e-5)
    same = compare(text_logits(dense, ids), text_logits(dense, ids), ids)
    assert (same.max_difference, same.kl, same.top1) == (0.0, 0.0, 1.0)


def test_layers_that_are_chosen() -> None:
    config = dense_config(num_layers=5)

    def mixtures(layers: str) -> list[int]:
        return UpcyclePlan(num_experts=2, top_k=1, layers=layers).config(config).moe_layers()

    assert mixtures("all") == [0, 1, 2, 3, 4]
    assert mixtures("every-2") == [1, 3]
    assert mixtures("every-1") == [0, 1, 2, 3, 4]
    assert mixtures("every-5") == [4]
    assert mixtures("after-0") == [0, 1, 2, 3, 4]
    assert mixtures("after-3") == [3, 4]
    assert mixtures("01001") == [1, 4]
    assert mixtures("1, 0, 0, 0, 0") == [0]


def test_everything_else_of_the_config_is_kept() -> None:
    dense = dense_config(num_layers=3, rope_theta=5e5, qk_norm="none", norm_eps=1e-5)
    upcycled = UpcyclePlan(num_experts=6, top_k=2, layers="after-1").config(dense)
    assert upcycled.first_k_dense == 1
    assert upcycled.moe.hidden_size == 0
    assert replace(upcycled, moe=dense.moe, moe_layer_freq=0, first_k_dense=0) == dense
    presets = UpcyclePlan(num_experts=8, top_k=2).config(ModelConfig(moe_layer_freq=0))
    assert presets.moe_layers() == [0, 1, 2, 3]


def test_meta_shapes_match_what_is_made() -> None:
    plan = UpcyclePlan(num_experts=3, top_k=2, granularity=2, shared_size=8, shared_gate=True)
    upcycled = upcycle_model(dense_model(), plan)
    experts = upcycled.layers[0].mlp.experts
    assert isinstance(experts, Experts)
    assert experts.gate_up_proj.shape == (6, 16, 16)
    assert upcycled.num_params() == sum(p.numel() for p in upcycled.parameters())
