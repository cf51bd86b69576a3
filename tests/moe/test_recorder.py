"""`Recorder`: the statistics against numpy, and adding up, resetting, detaching."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from dmoe.moe import MoE, MoEConfig, Recorder


def build(**changes: object) -> MoE:
    layer = MoE(MoEConfig(**{"hidden_size": 16, "intermediate_size": 8, "num_experts": 6, "top_k": 2, **changes}))
    with torch.no_grad():
        layer.router.weight.normal_()
        layer.router.weight[5] = 0
        layer.router.weight[5, 0] = -100.0  # with x[:, 0] = 1, never among the best two
    return layer


def tokens(count: int) -> torch.Tensor:
    x = torch.randn(count, 16)
    x[:, 0] = 1.0
    return x


def numpy_statistics(layer: MoE, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Counts [E], and [aux loss, z-loss, entropy, confidence]."""
    logits = x.double().numpy() @ layer.router.weight.detach().double().numpy().T
    exponent = np.exp(logits)
    probs = exponent / exponent.sum(1, keepdims=True)
    chosen = np.argsort(-probs, axis=1)[:, : layer.config.top_k]
    counts = np.bincount(chosen.ravel(), minlength=layer.config.num_experts)
    aux = layer.config.num_experts * (counts / chosen.size * probs.mean(0)).sum()
    z_loss = (np.log(exponent.sum(1)) ** 2).mean()
    entropy = -np.where(probs > 0, probs * np.log(np.maximum(probs, 1e-300)), 0).sum(1).mean()
    return counts, np.array([aux, z_loss, entropy, probs.max(1).mean()])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_statistics_against_numpy(training: bool) -> None:
    layer = build().train(training)
    recorder = Recorder(layer)
    assert recorder.summary() == {}
    batches = [tokens(30), tokens(50)]
    for x in batches:
        layer(x)
        recorder.update()
    counts = sum(numpy_statistics(layer, x)[0] for x in batches)
    scalars = sum(numpy_statistics(layer, x)[1] for x in batches) / 2
    s = recorder.summary()[""]
    assert s.tokens_per_expert == counts.tolist()
    assert sum(s.tokens_per_expert) == 160
    np.testing.assert_allclose(s.load, counts / 160)
    assert s.max_over_mean == pytest.approx(counts.max() / counts.mean())
    assert s.dead_experts == (counts == 0).sum() >= 1
    np.testing.assert_allclose([s.aux_loss, s.z_loss, s.router_entropy, s.confidence], scalars, rtol=1e-4)
    assert (s.rank_load, s.rank_max_over_mean) == ([], 1.0)


def test_undecided_and_collapsed_routers() -> None:
    layer = MoE(MoEConfig(hidden_size=16, intermediate_size=8, num_experts=6, top_k=1))
    recorder = Recorder(layer)
    with torch.no_grad():
        layer.router.weight.zero_()
    layer(tokens(12))
    recorder.update()
    assert recorder.summary()[""].router_entropy == pytest.approx(math.log(6), rel=1e-6)
    assert recorder.summary()[""].confidence == pytest.approx(1 / 6, rel=1e-6)
    recorder.reset()
    with torch.no_grad():
        layer.router.weight[3, 0] = 100.0
    layer(tokens(12))
    recorder.update()
    s = recorder.summary()[""]
    assert s.tokens_per_expert == [0, 0, 0, 12, 0, 0]
    assert (s.max_over_mean, s.dead_experts) == (6.0, 5)
    assert s.router_entropy == pytest.approx(0.0, abs=1e-6)
    assert s.aux_loss == pytest.approx(6.0)
    assert s.confidence == pytest.approx(1.0)


def test_confidence_of_scores_that_do_not_sum_to_one_and_of_padding() -> None:
    layer = build(score_function="sigmoid", top_k=6)
    recorder, x = Recorder(layer), tokens(9)
    mask = torch.arange(9) % 3 != 0
    layer(x.masked_fill(~mask.unsqueeze(1), math.nan), token_mask=mask)
    recorder.update()
    scores = 1 / (1 + np.exp(-(x[mask].double().numpy() @ layer.router.weight.detach().double().numpy().T)))
    wanted = (scores / scores.sum(1, keepdims=True)).max(1).mean()
    assert recorder.summary()[""].confidence == pytest.approx(wanted, rel=1e-5)


def test_layers_of_different_sizes() -> None:
    """Each has its own numbers, in the order of the model."""
    model = nn.Sequential(build(), build(num_experts=8, top_k=3), build())
    recorder, x = Recorder(model), tokens(30)
    for _ in range(2):
        model(x)
        recorder.update()
    summary = recorder.summary()
    assert list(summary) == ["0", "1", "2"]
    assert [len(s.load) for s in summary.values()] == [6, 8, 6]
    assert [sum(s.tokens_per_expert) for s in summary.values()] == [120, 180, 120]
    counts, scalars = numpy_statistics(model[0], x)
    assert summary["0"].tokens_per_expert == (2 * counts).tolist()
    np.testing.assert_allclose([summary["0"].aux_loss, summary["0"].confidence], scalars[[0, 3]], rtol=1e-4)


def test_reset_and_names() -> None:
    model = nn.Sequential(build(), build())
    recorder = Recorder(model)
    model(tokens(4))
    recorder.update()
    assert list(recorder.summary()) == ["0", "1"]
    recorder.reset()
    assert recorder.summary() == {}
    model(tokens(7))
    recorder.update()
    assert [sum(s.tokens_per_expert) for s in recorder.summary().values()] == [14, 14]


def test_only_update_adds() -> None:
    layer = build()
    recorder = Recorder(layer)
    layer(tokens(4))
    layer(tokens(9))  # overwrites
    recorder.update()
    assert sum(recorder.summary()[""].tokens_per_expert) == 18


def test_detach_stops_recording() -> None:
    layer = build()
    recorder = Recorder(layer)
    layer(tokens(4))
    recorder.update()
    recorder.detach()
    assert layer.stats is None
    layer(tokens(9))
    assert sum(recorder.summary()[""].tokens_per_expert) == 8


def test_a_new_recorder_replaces_the_old_one() -> None:
    layer = build()
    Recorder(layer)
    recorder = Recorder(layer)
    layer(tokens(4))
    recorder.update()
    assert sum(recorder.summary()[""].tokens_per_expert) == 8


def test_no_tokens() -> None:
    layer = build()
    recorder = Recorder(layer)
    layer(torch.empty(0, 16))
    recorder.update()
    s = recorder.summary()[""]
    assert s.tokens_per_expert == [0] * 6
    assert (s.aux_loss, s.z_loss, s.router_entropy, s.confidence, s.max_over_mean) == (0.0, 0.0, 0.0, 0.0, 0.0)
    assert s.rank_max_over_mean == 1.0


def test_recording_keeps_no_graph() -> None:
    layer = build()
    recorder = Recorder(layer)
    layer(tokens(4))
    recorder.update()
    assert layer.stats is not None
    assert not layer.stats.flat.requires_grad
    assert not any(layers._totals_LM.requires_grad for layers in recorder._alike)
