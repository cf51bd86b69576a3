"""`weigh_input`: against transformers' Llama 4 block, and against a loop in fp64 for what that block does not have."""

from typing import Any

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmoe.moe import MoE, MoEConfig, Recorder

D, F, T = 16, 8, 21


def build(**changes: Any) -> MoE:
    config = {"hidden_size": D, "intermediate_size": F, "num_experts": 7, "score_function": "sigmoid"}
    config |= {"norm_topk_prob": False, "aux_loss_coef": 0.0, "z_loss_coef": 0.0, "weigh_input": True}
    layer = MoE(MoEConfig(**{**config, **changes}))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return layer


def by_hand(layer: MoE, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """The routed experts, pick by pick; differentiable. Scores are sigmoids, picks of the id E are left out."""
    experts, y_TD = layer.experts, []
    scores_TE = 1 / (1 + torch.exp(-x_TD @ layer.router.weight.T))
    for x_D, scores_E, ids_K in zip(x_TD, scores_TE, ids_TK.tolist()):
        y_D = torch.zeros_like(x_D)
        for e in (e for e in ids_K if e < layer.config.num_experts):
            up_H = experts.gate_up_proj[e] @ (scores_E[e] * x_D)
            if layer.config.bias:
                up_H = up_H + experts.gate_up_bias[e]
            gate_F, up_F = up_H.chunk(2)
            y_D = y_D + experts.down_proj[e] @ (gate_F / (1 + torch.exp(-gate_F)) * up_F)
            if layer.config.bias:
                y_D = y_D + experts.down_bias[e]
        y_TD.append(y_D)
    return torch.stack(y_TD) if y_TD else torch.zeros_like(x_TD)


def gradients(layer: MoE, y: Tensor, x: Tensor) -> list[Tensor]:
    grad = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape)
    parameters = [x, layer.router.weight, *layer.experts.parameters()]
    return [y, *torch.autograd.grad(y, parameters, grad.to(y.dtype))]


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_llama4(top_k: int, backend: str) -> None:
    pytest.importorskip("transformers")
    from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    sizes = {"hidden_size": D, "intermediate_size": F, "num_local_experts": 7, "num_experts_per_tok": top_k}
    theirs = Llama4TextMoe(Llama4TextConfig(**sizes))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    ours = build(top_k=top_k, shared_intermediate_size=F, backend=backend)

    def as_ours(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        renamed = {name.replace("shared_expert.", "shared_experts."): t for name, t in tensors.items()}
        return {name: t.transpose(1, 2) if name.startswith("experts") else t for name, t in renamed.items()}

    ours.load_state_dict(as_ours(dict(theirs.named_parameters())))
    x_theirs = torch.randn(T, D, requires_grad=True)
    x_ours = x_theirs.detach().clone().requires_grad_()
    want, got = theirs(x_theirs)[0], ours(x_ours)
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    assert relative_error(got.detach(), want.detach()) <= 1e-6
    assert relative_error(x_ours.grad, x_theirs.grad) <= 1e-6
    wanted = as_ours({name: p.grad for name, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        assert relative_error(parameter.grad, wanted[name]) <= 2e-6, name


@pytest.mark.parametrize("num_tokens", [0, 1, T])
@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1, "num_experts": 1},
        {"top_k": 2, "capacity_factor": 0.5},
        {"top_k": 2, "capacity_factor": 0.5, "pad_to_capacity": True},
        {"top_k": 2, "routing": "hash"},
    ],
    ids=str,
)
def test_against_the_loop(changes: dict[str, Any], num_tokens: int) -> None:
    layer = build(bias=True, **changes).double()
    with torch.no_grad():
        layer.router.weight[0] *= 3  # skew
    x = torch.randn(num_tokens, D, dtype=torch.float64, requires_grad=True)
    token_ids = torch.arange(num_tokens)
    recorder = Recorder(layer)
    y = layer(x, token_ids=token_ids)
    recorder.update()
    ids_TK = layer.router(x, token_ids_T=token_ids).topk_ids_TK
    want = gradients(layer, by_hand(layer, x, ids_TK), x) if num_tokens else [torch.zeros_like(x)]
    for value, wanted in zip(gradients(layer, y, x), want):
        torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)
    dropped = int((ids_TK == layer.config.num_experts).sum())
    assert recorder.summary()[""].dropped == dropped
    assert (dropped > 0) == ("capacity_factor" in changes and num_tokens == T)


def test_experts_choice_and_latent_experts() -> None:
    """Tokens in no order of picks; the weight multiplies the projected token."""
    layer = build(routing="expert_choice", top_k=2, capacity_factor=0.5, latent_size=8).double()
    x = torch.randn(T, D, dtype=torch.float64)
    routing = layer.router(x)
    slots, want = routing.slots, torch.zeros(T, 8, dtype=torch.float64)
    for e in range(7):
        for t in slots.tokens_EC[e].tolist():
            latent = layer.fc1_latent_proj.weight @ x[t] * torch.sigmoid(layer.router.weight[e] @ x[t])
            gate, up = (layer.experts.gate_up_proj[e] @ latent).chunk(2)
            want[t] += layer.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(layer(x), want @ layer.fc2_latent_proj.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", [{"top_k": 1}, {"top_k": 3}, {"top_k": 3, "pad_to_capacity": True}], ids=str)
def test_padding_leaves_no_trace(changes: dict[str, Any]) -> None:
    changes = {"bias": True, "capacity_factor": 2.0 * changes.get("pad_to_capacity", 0), **changes}
    layer = build(**changes, aux_loss_coef=0.1, z_loss_coef=0.1)
    x, mask = torch.randn(T, D), torch.arange(T) % 3 != 1
    x[~mask] = float("nan")
    leaf, clean = x.requires_grad_(), x[mask].detach().requires_grad_()
    y, want = layer(leaf, token_mask=mask), layer(clean)
    assert not y[~mask].any()
    torch.testing.assert_close(y[mask], want)
    wanted = torch.autograd.grad(want.square().sum(), [clean, *layer.parameters()])
    got = torch.autograd.grad(y[mask].square().sum(), [leaf, *layer.parameters()])
    assert not got[0][~mask].any()
    for value, other in zip((got[0][mask], *got[1:]), wanted):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_losses_and_recomputation(reentrant: bool) -> None:
    """The balancing loss is there, and once."""
    layer, x = build(top_k=2, aux_loss_coef=0.3, z_loss_coef=0.1), torch.randn(T, D, requires_grad=True)
    recorder = Recorder(layer)

    def router_gradient(call: Any) -> tuple[Tensor, Any]:
        recorder.reset()
        y = call(x)
        recorder.update()
        layer.zero_grad()
        y.sum().backward()
        return layer.router.weight.grad.clone(), recorder.summary()[""]

    want = router_gradient(layer)
    got = router_gradient(lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    torch.testing.assert_close(got[0], want[0])
    assert got[1] == want[1]
    main = torch.autograd.grad(layer.eval()(x).sum(), layer.router.weight)[0]
    routing = layer.train().router(x)
    loss = 0.3 * 7 * (routing.tokens_per_expert() / (2 * T) * _normalized(routing.scores_TE).mean(0)).sum()
    loss = loss + 0.1 * routing.logits_TE.logsumexp(1).square().mean()
    torch.testing.assert_close(want[0] - main, torch.autograd.grad(loss, layer.router.weight)[0], rtol=1e-4, atol=1e-5)


def _normalized(scores_TE: Tensor) -> Tensor:
    return scores_TE / scores_TE.sum(1, keepdim=True)


def test_weights_are_applied_in_fp32_in_a_bf16_layer() -> None:
    """What the experts read is the exact product, rounded once."""
    layer = build(top_k=2).bfloat16()
    x, read = torch.randn(T, D).bfloat16(), []
    layer.experts.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    assert layer(x).dtype == torch.bfloat16
    weights_TK = layer.router(x).topk_weights_TK
    want = (x.double()[:, None] * weights_TK.double()[:, :, None]).float().bfloat16().view(-1, D)
    assert torch.equal(read[0], want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


def test_frozen_router_and_frozen_experts() -> None:
    for frozen in ("router", "experts"):
        layer = build(top_k=2)
        getattr(layer, frozen).requires_grad_(False)
        x = torch.randn(T, D, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        want = torch.autograd.grad(by_hand(layer, x, layer.router(x).topk_ids_TK).sum(), x)[0]
        torch.testing.assert_close(x.grad, want, rtol=1e-4, atol=1e-5)
        assert all((p.grad is None) == name.startswith(frozen) for name, p in layer.named_parameters())
