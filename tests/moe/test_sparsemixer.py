"""Routing "sparsemixer": against transformers' PhiMoE, and its gradient against the formula in fp64."""

from typing import Any

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmoe.errors import ConfigError
from dmoe.moe import MoE, MoEConfig, record_routing, replay_routing
from dmoe.ops import sparsemixer

D, F, T = 16, 8, 40
EPS = 0.01


def build(**changes: Any) -> MoE:
    config = {"hidden_size": D, "intermediate_size": F, "num_experts": 6, "top_k": 2, "routing": "sparsemixer"}
    config |= {"norm_topk_prob": False, "aux_loss_coef": 0.0, "z_loss_coef": 0.0}
    layer = MoE(MoEConfig(**{**config, **changes}))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


def some_logits(num_experts: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Far and near each other, of both signs, all negative, equal, all zero."""
    spread = torch.randn(300, num_experts, dtype=dtype)
    near = torch.randn(100, 1, dtype=dtype) * (1 + 0.02 * torch.randn(100, num_experts, dtype=dtype))
    return torch.cat([spread, near, -spread.abs(), -near.abs(), torch.ones_like(near[:2]), torch.zeros_like(near[:2])])


def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """transformers' function. It draws the numbers of the second mask twice; of these the first are left."""
    modeling = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")
    monkeypatch.setattr(Tensor, "uniform_", lambda tensor, *args, **options: tensor)
    return modeling.sparsemixer


@pytest.mark.parametrize("num_experts", [2, 3, 6, 16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("eps", [0.0, EPS, 0.4])
def test_choice_weights_and_gradient(
    num_experts: int, training: bool, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits for the same seed; no weight is NaN."""
    reference, logits = theirs(monkeypatch), some_logits(num_experts)
    leaves, results = [logits.clone().requires_grad_() for _ in range(2)], []
    for leaf, call in zip(leaves, (reference, None)):
        torch.manual_seed(5)
        if call is None:
            ids, weights = sparsemixer(leaf, eps, training=training)
        else:
            weights, ids = call(leaf, eps, training)
        results.append((ids, weights))
    (want_ids, want), (ids, got) = results
    assert torch.equal(ids, want_ids)
    assert torch.equal(got, want)
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-5, atol=1e-7)
    assert got.isfinite().all()
    assert (ids[:, 0] != ids[:, 1]).all()


def near_experts(logits: list[float], taken: set[int], eps: float) -> list[int]:
    best = max(l for e, l in enumerate(logits) if e not in taken)
    scale = [max(abs(l), best) for l in logits]
    return [e for e, l in enumerate(logits) if e not in taken and not best - l > 2 * eps * scale[e]]


@pytest.mark.parametrize("given", [False, True])
def test_gradient_is_the_formula(given: bool) -> None:
    """dw / dl_e = w ([e is the pick] - p_e), whatever the factor on the weight; fp64, token by token."""
    logits = (1 + 0.05 * torch.randn(60, 5, dtype=torch.float64)).requires_grad_()
    ids_T2 = torch.rand(60, 5).argsort(1)[:, :2] if given else None
    ids, weights = sparsemixer(logits, 0.03, training=True, ids_T2=ids_T2)
    if given:
        assert torch.equal(ids, ids_T2)
    grad = torch.randn(60, 2, dtype=torch.float64)
    weights.backward(grad)
    want, thirds = torch.zeros_like(logits), 0
    for t, row in enumerate(logits.detach().tolist()):
        taken: set[int] = set()
        for k, pick in enumerate(ids[t].tolist()):
            near = sorted({*near_experts(row, taken, 0.03), pick})
            p = torch.tensor([row[e] for e in near], dtype=torch.float64).softmax(0)
            w = p[near.index(pick)]
            for e, p_e in zip(near, p):
                want[t, e] += grad[t, k] * w * (float(e == pick) - p_e)
            if abs(weights[t, k].item() - w) > 1e-12:
                torch.testing.assert_close(weights[t, k].detach(), 0.3333 * w, rtol=1e-6, atol=0)
                assert pick != near[int(p.argmax())]
                thirds += 1
            taken.add(pick)
    torch.testing.assert_close(logits.grad, want, rtol=1e-10, atol=1e-12)
    assert 10 < thirds < 110


def test_draws_follow_the_probabilities() -> None:
    num_tokens, row = 40000, torch.tensor([1.0, 0.99, 0.985, 0.5])  # the last is not near
    ids, weights = sparsemixer(row.expand(num_tokens, 4), EPS, training=True)
    p = row[:3].softmax(0)
    share = torch.bincount(ids[:, 0], minlength=4) / num_tokens
    torch.testing.assert_close(share, torch.cat([p, torch.zeros(1)]), rtol=0, atol=0.01)
    second = ids[ids[:, 0] == 0, 1]
    want = row[1:3].softmax(0)
    torch.testing.assert_close((second == 1).float().mean(), want[0], rtol=0, atol=0.02)
    unlikely = weights[ids[:, 0] == 1, 0] / p[1]
    assert ((unlikely - 1).abs() < 1e-4).float().mean() == pytest.approx(0.25, abs=0.02)
    assert ((unlikely - 1 / 3).abs() < 1e-3).float().mean() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(weights[ids[:, 0] == 0, 0].unique(), row[:3].softmax(0)[:1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_phimoe_block(backend: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and all gradients, in training with the same draws."""
    theirs(monkeypatch)
    from transformers.models.phimoe.configuration_phimoe import PhimoeConfig
    from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock

    config = PhimoeConfig(hidden_size=D, intermediate_size=F, num_local_experts=6, experts_implementation="eager")
    block, ours = PhimoeSparseMoeBlock(config).train(training), build(backend=backend).train(training)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        block.router.weight[1:4] = block.router.weight[:1] * torch.tensor([[1.001], [0.999], [1.002]])
    ours.load_state_dict(block.state_dict())
    x = torch.randn(2, 30, D)
    leaves, outputs = [x.clone().requires_grad_() for _ in range(2)], []
    for leaf, layer in zip(leaves, (block, ours)):
        torch.manual_seed(2)
        outputs.append(layer(leaf))
        outputs[-1].square().sum().backward()
    assert relative_error(outputs[1].detach(), outputs[0].detach()) <= 1e-6
    assert relative_error(leaves[1].grad, leaves[0].grad) <= 2e-6
    wanted = {name: p.grad for name, p in block.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, wanted[name]) <= 2e-6, name


def test_replayed_picks_are_weighed() -> None:
    """Also those that are not near the best; in evaluation the same bits."""
    layer, x = build(routed_scaling_factor=2.0).eval(), torch.randn(T, D)
    with record_routing(layer) as trace:
        first = layer(x)
    with replay_routing(layer, trace):
        assert torch.equal(layer(x), first)
    trace.layers[""][0] = layer.router(x).logits_TE.argsort(1)[:, :2]  # the worst
    with replay_routing(layer, trace):
        routing = layer.router(x)
    assert torch.equal(routing.topk_ids_TK, trace.layers[""][0])
    logits, weights = routing.logits_TE.double(), routing.topk_weights_TK.double()
    for t, (first_id, second_id) in enumerate(routing.topk_ids_TK.tolist()):
        near = sorted({*near_experts(logits[t].tolist(), set(), EPS), first_id})
        want = 2 * logits[t, near].softmax(0)[near.index(first_id)]
        torch.testing.assert_close(weights[t, 0], want, rtol=1e-5, atol=1e-7)
        near = sorted({*near_experts(logits[t].tolist(), {first_id}, EPS), second_id})
        want = 2 * logits[t, near].softmax(0)[near.index(second_id)]
        torch.testing.assert_close(weights[t, 1], want, rtol=1e-5, atol=1e-7)


def test_padding_capacity_and_no_tokens() -> None:
    layer, mask = build(capacity_factor=1.0, aux_loss_coef=0.1, z_loss_coef=0.1), torch.arange(T) % 4 != 2
    x = torch.randn(T, D).masked_fill(~mask.unsqueeze(1), float("nan")).requires_grad_()
    routing = layer.router(x.detach().nan_to_num(), mask)
    assert (routing.topk_ids_TK[~mask] == 6).all()
    assert not routing.topk_weights_TK[~mask].any()
    assert torch.bincount(routing.topk_ids_TK.flatten(), minlength=7)[:6].max() <= 14
    y = layer(x, token_mask=mask)
    y.sum().backward()
    assert y.isfinite().all()
    assert not y[~mask].any()
    assert x.grad.isfinite().all()
    assert layer.router.weight.grad.any()
    assert layer(torch.zeros(0, D)).shape == (0, D)


def test_recomputation_draws_the_same() -> None:
    layer, x, gradients = build(aux_loss_coef=0.1), torch.randn(T, D, requires_grad=True), []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(0)
        y = call(x)
        torch.rand(3)  # the generator is elsewhere when the backward runs
        y.square().sum().backward()
        gradients.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 1}, 'moe.top_k is 1: must be 2 with moe.routing "sparsemixer"'),
        ({"score_function": "sigmoid"}, "moe.score_function is 'sigmoid': must be 'softmax' with"),
        ({"norm_topk_prob": True}, "moe.norm_topk_prob is True: must be False with"),
        ({"softmax_after_topk": True}, "moe.softmax_after_topk is True: must be False with"),
        ({"expert_bias_rate": 0.1}, "moe.expert_bias_rate is 0.1: must be 0.0 with"),
        ({"n_group": 2}, "moe.n_group is 2: must be 1 with"),
        ({"sparsemixer_eps": -0.1}, "moe.sparsemixer_eps is -0.1: must be"),
    ],
)
def test_what_does_not_combine(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)
