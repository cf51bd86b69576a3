"""The attached losses: the right gradient, once, under checkpointing, accumulation and without gradients."""

import copy
from collections.abc import Callable

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dmoe.moe import MoE, MoEConfig, Recorder, attach_loss, set_aux_loss_scale


def build(aux: float = 0.3, z: float = 0.2, **changes: object) -> MoE:
    layer = MoE(
        MoEConfig(
            **{"hidden_size": 16, "intermediate_size": 8, "num_experts": 5, "top_k": 2, **changes},
            aux_loss_coef=aux,
            z_loss_coef=z,
        )
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer


def gradients(layer: MoE, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    layer.zero_grad(set_to_none=True)
    loss().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def written_out(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Load-balancing loss and z-loss in fp64 from the formulas, as functions of the router's weight."""
    weight = layer.router.weight
    num_experts, top_k = layer.config.num_experts, layer.config.top_k
    logits = x.reshape(-1, 16).double() @ weight.double().T
    probs = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    ids = probs.argsort(dim=1, descending=True)[:, :top_k]
    share = torch.bincount(ids.flatten(), minlength=num_experts).double() / ids.numel()
    balance = num_experts * (share * probs.mean(0)).sum()
    return balance, torch.log(torch.exp(logits).sum(1)).square().mean()


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert relative_error(got[name], want[name]) <= tolerance, name


@pytest.mark.parametrize(("aux", "z"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
def test_gradient_reaches_the_router(aux: float, z: float) -> None:
    """With the main loss multiplied by zero, what is left is the gradient of the auxiliary losses."""
    layer, x = build(aux, z), torch.randn(40, 16)
    got = gradients(layer, lambda: 0 * layer(x).sum())

    def want_loss() -> Tensor:
        balance, z_loss = written_out(layer, x)
        return aux * balance + z * z_loss

    want = gradients(layer, want_loss)
    assert relative_error(got["router.weight"], want["router.weight"]) <= 1e-5
    assert not got["experts.down_proj"].any()


def test_gradient_adds_to_the_main_loss_and_to_the_input() -> None:
    layer, x = build(), torch.randn(40, 16, requires_grad=True)
    off = copy.deepcopy(layer).eval()  # the same layer without the losses
    (layer(x).square().mean()).backward()
    with_losses = x.grad.clone(), layer.router.weight.grad
    x.grad = None
    balance, z_loss = written_out(off, x)
    (off(x).square().mean() + 0.3 * balance + 0.2 * z_loss).backward()
    assert relative_error(with_losses[0], x.grad) <= 1e-5
    assert relative_error(with_losses[1], off.router.weight.grad) <= 1e-5


def test_value_of_the_output_is_untouched() -> None:
    layer, x = build(), torch.randn(10, 16)
    assert torch.equal(layer(x), copy.deepcopy(layer).eval()(x))


@pytest.mark.parametrize("mode", ["eval", "no_grad", "coefficients of zero"])
def test_losses_are_not_attached(mode: str) -> None:
    layer, x = build(), torch.randn(10, 16)
    if mode == "no_grad":
        with torch.no_grad():
            assert not layer(x).requires_grad
        return
    layer = layer.eval() if mode == "eval" else build(0.0, 0.0)
    grads = gradients(layer, lambda: 0 * layer(x).sum())
    assert not any(g.any() for g in grads.values())


def test_frozen_router() -> None:
    layer, x = build(), torch.randn(10, 16)
    layer.router.weight.requires_grad_(False)
    grads = gradients(layer, lambda: layer(x).square().sum())
    assert set(grads) == {"experts.gate_up_proj", "experts.down_proj"}
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_checkpointing_changes_nothing(backend: str, use_reentrant: bool) -> None:
    """Same gradients bit for bit, and statistics of one forward, though the forward runs twice."""
    layer = build(backend=backend, shared_intermediate_size=8)
    recorder = Recorder(layer)
    x = torch.randn(30, 16, requires_grad=True)
    want = gradients(layer, lambda: layer(x).square().mean())
    recorder.update()
    plain = recorder.summary()
    recorder.reset()
    got = gradients(layer, lambda: checkpoint(layer, x, use_reentrant=use_reentrant).square().mean())
    recorder.update()
    assert recorder.summary() == plain
    assert plain[""].tokens_per_expert != [0] * 5
    assert sum(plain[""].tokens_per_expert) == 60
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("micro_batches", [2, 3])
def test_equal_micro_batches_give_the_gradient_of_one(micro_batches: int) -> None:
    layer, x = build(), torch.randn(20, 16)
    want = gradients(layer, lambda: layer(x).square().mean())
    set_aux_loss_scale(layer, 1 / micro_batches)
    got = gradients(layer, lambda: sum(layer(x).square().mean() / micro_batches for _ in range(micro_batches)))
    assert_same(got, want, 1e-6)
    set_aux_loss_scale(layer, 1.0)
    wrong = gradients(layer, lambda: sum(layer(x).square().mean() / micro_batches for _ in range(micro_batches)))
    assert relative_error(wrong["router.weight"], want["router.weight"]) > 0.01


@pytest.mark.parametrize("sizes", [[12, 12], [6, 6, 6, 6], [1] * 24, [5, 19], [0, 24], [1, 2, 3, 18]], ids=str)
def test_z_loss_of_a_split_batch_is_exact(sizes: list[int]) -> None:
    """A mean over tokens: parts weighted by their share of the tokens (1 / M for M equal parts) give the whole."""
    layer, x = build(aux=0.0), torch.randn(24, 16)
    want = gradients(layer, lambda: layer(x).square().sum() / x.numel())
    layer.zero_grad()
    for part in x.split(sizes):
        set_aux_loss_scale(layer, len(part) / 24)
        (layer(part).square().sum() / x.numel()).backward()
    assert_same({name: p.grad for name, p in layer.named_parameters()}, want, 1e-5)


def test_scale_reaches_every_layer_and_both_losses() -> None:
    model = nn.Sequential(build(), build())
    x = torch.randn(20, 16)
    set_aux_loss_scale(model, 1.0)
    (0 * model(x).sum()).backward()
    once = [layer.router.weight.grad.clone() for layer in model]
    model.zero_grad()
    set_aux_loss_scale(model, 0.25)
    (0 * model(x).sum()).backward()
    # The second layer's losses flow through the first one too, so both must be a quarter of what they were.
    for layer, want in zip(model, once, strict=True):
        assert relative_error(layer.router.weight.grad, want / 4) <= 1e-6


def test_attach_loss_by_itself() -> None:
    x, w = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = attach_loss(x, w**2, scale=0.5)
    assert torch.equal(y, x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))
    assert w.grad.item() == 2.0  # 0.5 * d(w^2)/dw = 0.5 * 4
