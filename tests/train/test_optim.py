"""Parameter groups and the learning-rate schedule."""

import pytest
import torch

from dmoe.config import ModelConfig, MoEConfig, OptimConfig
from dmoe.models import Decoder
from dmoe.train import build_optimizer, learning_rate


def grouped_names(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]


def model(**moe):
    return Decoder(
        ModelConfig(
            vocab_size=16, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, intermediate_size=8,
            first_k_dense=1, tie_embeddings=False, moe=MoEConfig(intermediate_size=4, num_experts=2, top_k=1, **moe),
        )
    )  # fmt: skip


def test_weight_decay_groups():
    decoder = model(bias=True, shared_intermediate_size=4)
    optimizer = build_optimizer(decoder, OptimConfig(weight_decay=0.3))
    decayed, plain = grouped_names(decoder, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    every_layer = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]
    every_layer += ["self_attn.o_proj.weight"]
    assert decayed == {
        "embed_tokens.weight",
        "lm_head.weight",
        *(f"layers.{i}.{name}" for i in (0, 1) for name in every_layer),
        *(f"layers.0.mlp.{x}_proj.weight" for x in ("gate", "up", "down")),
        "layers.1.mlp.experts.gate_up_proj",
        "layers.1.mlp.experts.down_proj",
        *(f"layers.1.mlp.shared_experts.{x}_proj.weight" for x in ("gate", "up", "down")),
    }
    assert decayed | plain == dict(decoder.named_parameters()).keys()
    assert "layers.1.mlp.router.weight" in plain  # a matrix by shape
    assert any(name.endswith("gate_up_bias") for name in plain)  # a matrix by shape


def test_decay_moves_only_the_decayed_group():
    decoder = model()
    optimizer = build_optimizer(decoder, OptimConfig(lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    for p in decoder.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed, _ = grouped_names(decoder, optimizer)
    for name, p in decoder.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if name in decayed else 1.0))


def test_frozen_parameters_are_in_no_group():
    decoder = model()
    decoder.embed_tokens.weight.requires_grad_(False)
    names = set.union(*grouped_names(decoder, build_optimizer(decoder, OptimConfig())))
    assert names == dict(decoder.named_parameters()).keys() - {"embed_tokens.weight"}


POINTS = {
    # 11 steps, 1 of warm-up: the last step (10) is at the minimum, step 1 at the peak; halfway is (1 + 0.2) / 2
    "cosine": {0: 1.0, 1: 1.0, 10: 0.2},
    # decays over the last half: from step 6 (1.0) to step 10 (0.2), 0.2 a step
    "wsd": {0: 1.0, 1: 1.0, 5: 1.0, 6: 1.0, 7: 0.8, 8: 0.6, 9: 0.4, 10: 0.2},
    "constant": {0: 1.0, 1: 1.0, 10: 1.0, 1000: 1.0},
}


@pytest.mark.parametrize(("schedule", "step", "share"), [(s, k, v) for s, p in POINTS.items() for k, v in p.items()])
def test_schedule(schedule, step, share):
    config = OptimConfig(lr=0.02, schedule=schedule, warmup_steps=1, min_lr_ratio=0.2, decay_fraction=0.5)
    assert learning_rate(step, 11, config) == pytest.approx(0.02 * share)


def test_cosine_by_hand():
    # 4 steps of warm-up, then 9 steps (4 to 12): cos at 0, 1/4, 1/2, 3/4 and 1 of its half period
    config = OptimConfig(lr=1.0, schedule="cosine", warmup_steps=4, min_lr_ratio=0.0)
    rates = [learning_rate(step, 13, config) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[6] == pytest.approx(0.5 + 2**0.5 / 4)
    assert rates[8] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.5 - 2**0.5 / 4)
    assert rates[12] == pytest.approx(0.0, abs=1e-15)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    config = OptimConfig(lr=0.5, schedule=schedule, warmup_steps=5)
    assert [learning_rate(step, 100, config) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 50), (2, 1), (10, 10), (10, 9)])
def test_rate_is_positive_and_at_most_the_peak_in_short_runs(schedule, steps, warmup):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup_steps=warmup)
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)


def test_a_rate_after_the_end_stays_at_the_minimum():
    config = OptimConfig(lr=1.0, schedule="wsd", warmup_steps=0, min_lr_ratio=0.1)
    assert learning_rate(500, 100, config) == pytest.approx(0.1)
