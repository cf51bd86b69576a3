"""Balancing over sequences, steps and by a bias, against formulas in fp64; padding; checkpointing; accumulation."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.moe import BatchGroups, LoadBalancer, MoE, MoEConfig, Recorder, batch_sums

D, E, K = 16, 6, 2


def build(**changes: object) -> MoE:
    config = {"hidden_size": D, "intermediate_size": 8, "num_experts": E, "top_k": K, "aux_loss_coef": 0.0}
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{**config, "z_loss_coef": 0.0, **changes}))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
        layer.router.weight[E - 1] = 0  # with positive logits elsewhere seldom or never chosen
    return layer


def probabilities(layer: MoE, x: Tensor) -> Tensor:
    """[..., E] in fp64, of softmax or normalised sigmoid scores."""
    logits = x.double() @ layer.router.weight.double().T
    if layer.config.score_function == "sigmoid":
        scores = 1 / (1 + torch.exp(-logits))
        return scores / scores.sum(-1, keepdim=True)
    return torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)


def balance(probs_TE: Tensor, load_E: Tensor) -> Tensor:
    return E * (load_E * probs_TE.mean(0)).sum()


def load(probs_TE: Tensor) -> Tensor:
    chosen = probs_TE.argsort(dim=1, descending=True)[:, :K]
    return torch.bincount(chosen.flatten(), minlength=E).double() / max(chosen.numel(), 1)


def router_gradient(layer: MoE, loss: Callable[[], Tensor]) -> Tensor:
    layer.zero_grad(set_to_none=True)
    loss().backward()
    return layer.router.weight.grad.clone()


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_loss_of_each_sequence(score_function: str) -> None:
    layer, x = build(seq_aux_loss_coef=0.3, score_function=score_function), torch.randn(3, 10, D)
    x[1] = x[1, :1]  # a sequence of one token over and over: all picks on two experts

    def want() -> Tensor:
        probs = probabilities(layer, x)
        return 0.3 * sum(balance(p, load(p.detach())) for p in probs) / 3

    recorder = Recorder(layer)
    got = router_gradient(layer, lambda: 0 * layer(x).sum())
    recorder.update()
    assert relative_error(got, router_gradient(layer, want)) <= 1e-5
    assert recorder.summary()[""].seq_aux_loss == pytest.approx(want().item() / 0.3, rel=1e-5)
    # Rows without sequences are one.
    flat = build(seq_aux_loss_coef=0.3, aux_loss_coef=0.0)
    rows = build(aux_loss_coef=0.3)
    a, b = (router_gradient(each, lambda each=each: 0 * each(x.flatten(0, 1)).sum()) for each in (flat, rows))
    torch.testing.assert_close(a, b)


def test_losses_add_up() -> None:
    coefficients = {"aux_loss_coef": 0.3, "seq_aux_loss_coef": 0.2, "global_aux_loss_coef": 0.1, "z_loss_coef": 0.05}
    x = torch.randn(2, 12, D)
    together = build(**coefficients)
    got = router_gradient(together, lambda: 0 * together(x).sum())
    parts = []
    for name, value in coefficients.items():
        layer = build(**{name: value})
        parts.append(router_gradient(layer, lambda layer=layer: 0 * layer(x).sum()))
        assert parts[-1].any()
    torch.testing.assert_close(got, sum(parts))


@pytest.mark.parametrize("recompute", [False, True])
def test_load_of_the_step_so_far(recompute: bool) -> None:
    """Three micro-batches in flight at once, as in a pipeline; then a new step."""
    layer = build(global_aux_loss_coef=0.3)
    model = nn.Sequential(_Checkpointed(layer) if recompute else layer)
    balancer = LoadBalancer(model)
    batches = [torch.randn(9, D) for _ in range(3)]
    probs = [probabilities(layer, x).detach() for x in batches]
    counts = [load(p) for p in probs]

    def gradient(outputs: list[Tensor]) -> Tensor:
        layer.zero_grad(set_to_none=True)
        for y in outputs:  # the first in goes backward first
            (0 * y.sum()).backward()
        return layer.router.weight.grad.clone()

    def want(order: list[int]) -> Tensor:
        loss = 0.0
        for n, i in enumerate(order):
            so_far = sum(counts[j] for j in order[: n + 1]) / (n + 1)
            loss = loss + 0.3 * balance(probabilities(layer, batches[i]), so_far)
        return router_gradient(layer, lambda: loss)

    got = gradient([model(x) for x in batches])
    assert relative_error(got, want([0, 1, 2])) <= 1e-5
    model.eval()(batches[0])  # counts for nothing
    model.train()
    balancer.step()
    got = gradient([model(batches[2]), model(batches[0])])
    assert relative_error(got, want([2, 0])) <= 1e-5


class _Checkpointed(nn.Module):
    def __init__(self, layer: MoE, *, reentrant: bool = False) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("recompute", ["", "checkpoint", "reentrant"])
@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_bias_of_the_choice(score_function: str, recompute: str) -> None:
    layer = build(expert_bias_rate=0.01, score_function=score_function)
    model = nn.Sequential(_Checkpointed(layer, reentrant=recompute == "reentrant") if recompute else layer)
    balancer = LoadBalancer(model)
    bias, expected = layer.router.e_score_correction_bias, torch.zeros(E, dtype=torch.float64)
    for _ in range(4):
        total = torch.zeros(E, dtype=torch.float64)
        for x in (torch.randn(3, 7, D, requires_grad=True), torch.randn(3, 7, D, requires_grad=True)):
            logits = x.detach().flatten(0, 1).double() @ layer.router.weight.detach().double().T
            scores = logits.softmax(-1) if score_function == "softmax" else logits.sigmoid()
            chosen = (scores + expected).argsort(dim=1, descending=True)[:, :K]
            total += torch.bincount(chosen.flatten(), minlength=E)
            y = model(x)
            assert torch.equal(layer.router(x.flatten(0, 1)).topk_ids_TK.sort(1).values, chosen.sort(1).values)
            weights = scores.gather(1, layer.router(x.flatten(0, 1)).topk_ids_TK)  # without the bias
            weights = weights / weights.sum(1, keepdim=True)
            torch.testing.assert_close(layer.router(x.flatten(0, 1)).topk_weights_TK, weights.float())
            y.sum().backward()
        balancer.step()
        expected = expected + 0.01 * torch.sign(total.mean() - total)
        expected = expected - expected.mean()
        torch.testing.assert_close(bias.double(), expected, atol=1e-7, rtol=0)
    assert expected[E - 1] > expected.mean()
    model.eval()(torch.randn(5, D))
    balancer.step()  # no load, no change
    torch.testing.assert_close(bias.double(), expected, atol=1e-7, rtol=0)


def test_bias_is_kept_and_stays_fp32() -> None:
    layer = build(expert_bias_rate=0.001)
    balancer = LoadBalancer(layer)
    layer(torch.randn(9, D))
    balancer.step()
    kept = layer.router.e_score_correction_bias.clone()
    assert kept.any()
    names = set(layer.state_dict())
    assert "router.e_score_correction_bias" in names
    assert not [name for name in names if "counts" in name]
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.router.weight.dtype == torch.bfloat16
    assert torch.equal(half.router.e_score_correction_bias, kept)
    other = build(expert_bias_rate=0.001)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.router.e_score_correction_bias, kept)
    layer.reset_parameters()
    assert not layer.router.e_score_correction_bias.any()
    discarded = build(expert_bias_rate=0.001)
    balancer = LoadBalancer(discarded)
    discarded(torch.randn(9, D))
    balancer.discard()
    balancer.step()
    assert not discarded.router.e_score_correction_bias.any()


def test_copies_and_replacements() -> None:
    """A copy counts for itself, a second balancer counts once, and a detached one not at all."""
    model = nn.Sequential(build(expert_bias_rate=0.01))
    LoadBalancer(model)
    balancer = LoadBalancer(model)
    other = copy.deepcopy(model)
    other(torch.randn(50, D))
    assert not model[0].step_load.step_E.any()
    assert other[0].step_load.step_E.sum() == 100
    model(torch.randn(7, D))
    assert model[0].step_load.step_E.sum() == 14
    assert pickle.loads(pickle.dumps(model))[0].step_load.step_E.sum() == 14
    balancer.detach()
    model(torch.randn(7, D))
    balancer.step()
    assert not model[0].router.e_score_correction_bias.any()


def test_nothing_waits_in_a_recomputed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that ends early must not have begun a reduction that only its end would wait for."""
    begun, ended = [], []
    monkeypatch.setattr(batch_sums, "start_all_reduce", lambda sums, group: begun.append(1) or sums)
    monkeypatch.setattr(batch_sums, "finish_all_reduce", lambda sums: ended.append(1) or sums)
    layer = build(expert_bias_rate=0.01)
    layer.groups = BatchGroups(batch=object())  # type: ignore[arg-type]
    model = nn.Sequential(_Checkpointed(layer))
    LoadBalancer(model)
    model(torch.randn(9, D)).sum().backward()
    assert len(begun) == len(ended) >= 1


EVERYTHING = {"aux_loss_coef": 0.3, "seq_aux_loss_coef": 0.2, "global_aux_loss_coef": 0.1, "z_loss_coef": 0.05}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score_function": "sigmoid", "expert_bias_rate": 0.1},
        {"shared_intermediate_size": 4, "shared_expert_gate": True, "latent_size": 8},
        {"capacity_factor": 0.7},
        {"routing": "sinkhorn"},
        {"routing": "expert_choice", "seq_aux_loss_coef": 0.0},
    ],
    ids=["topk", "bias", "shared", "capacity", "sinkhorn", "expert_choice"],
)
def test_padding_routes_counts_and_costs_nothing(changes: dict[str, object]) -> None:
    """Garbage in padded places changes no other output, no gradient and no statistic."""
    layer = build(**{**EVERYTHING, **changes})
    recorder, x = Recorder(layer), torch.randn(3, 8, D)
    mask = torch.arange(8) < torch.tensor([8, 3, 0]).unsqueeze(1)
    results = []
    for garbage in (0.0, 1e3, torch.nan):
        padded = torch.where(mask.unsqueeze(-1), x, garbage * torch.randn_like(x)).requires_grad_()
        layer.zero_grad(set_to_none=True)
        y = layer(padded, token_mask=mask)
        y[mask].square().sum().backward()
        recorder.update()
        grads = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        summary = recorder.summary()[""]
        results.append(
            [y[mask], padded.grad[mask], *grads, torch.tensor(summary.aux_loss), torch.tensor(summary.z_loss)]
        )
        assert not padded.grad[~mask].any()
        assert sum(summary.tokens_per_expert) <= 11 * K or "expert_choice" in changes.values()
        recorder.reset()
        assert not y[~mask].any()
    for zeros, large, nan in zip(*results):
        torch.testing.assert_close(zeros, large, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(zeros, nan, rtol=1e-6, atol=1e-7)


def test_padding_is_as_if_it_were_not_there() -> None:
    layer, x = build(**EVERYTHING), torch.randn(3, 8, D)
    mask = torch.arange(8) < torch.tensor([[8], [5], [0]])
    alone = [x[0], x[1, :5]]
    y = layer(x, token_mask=mask)
    for got, tokens in zip((y[0], y[1, :5]), alone):
        torch.testing.assert_close(got, layer(tokens))
    probs = [probabilities(layer, tokens) for tokens in alone]
    everything = torch.cat(probs)
    loss = 0.4 * balance(everything, load(everything.detach()))  # batch and step are one here
    loss = loss + 0.2 * sum(balance(p, load(p.detach())) for p in probs) / 2
    logits = torch.cat(alone).double() @ layer.router.weight.double().T
    loss = loss + 0.05 * torch.log(torch.exp(logits).sum(1)).square().mean()
    want = router_gradient(layer, lambda: loss)
    got = router_gradient(layer, lambda: 0 * layer(x, token_mask=mask).sum())
    assert relative_error(got, want) <= 1e-5


def test_no_token_at_all() -> None:
    layer = build(**EVERYTHING, expert_bias_rate=0.1, score_function="sigmoid")
    balancer = LoadBalancer(layer)
    for x, mask in ((torch.randn(0, D), None), (torch.randn(2, 3, D), torch.zeros(2, 3, dtype=torch.bool))):
        gradient = router_gradient(layer, lambda x=x, mask=mask: layer(x, token_mask=mask).sum())
        assert not gradient.any()
    balancer.step()
    assert not layer.router.e_score_correction_bias.any()
