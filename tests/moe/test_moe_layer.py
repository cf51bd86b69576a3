"""`MoE` as a module: its value, shapes, dtypes, functional use, copies, initial weights."""

import copy
import math

import pytest
import torch
from dense_oracle import Problem, dense_moe, relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad

from dmoe.errors import ConfigError
from dmoe.moe import MoE, MoEConfig, Recorder, moe_layers


def config(**changes: object) -> MoEConfig:
    return MoEConfig(**{"hidden_size": 16, "intermediate_size": 8, "num_experts": 4, "top_k": 2, **changes})


def spread(layer: MoE) -> MoE:
    """Weights of order 1, so that the layer's output is not close to zero, and biases that are not zero."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    return layer


def oracle(layer: MoE, x: Tensor) -> Tensor:
    """The layer in fp64 from its parameters: route, then the dense oracle, then the shared expert."""
    c = layer.config
    p = {name: parameter.double() for name, parameter in layer.named_parameters()}
    x_TD = x.reshape(-1, c.hidden_size).double()
    logits = x_TD @ p["router.weight"].T
    exponent = torch.exp(logits)
    scores = exponent / exponent.sum(1, keepdim=True) if c.score_function == "softmax" else 1 / (1 + 1 / exponent)
    ids = scores.argsort(dim=1, descending=True)[:, : c.top_k]
    weights = scores.gather(1, ids)
    if c.norm_topk_prob:
        weights = weights / weights.sum(1, keepdim=True)
    up = "gate_up" if c.gated else "up"
    y = dense_moe(
        Problem(
            x_TD,
            ids,
            weights * c.routed_scaling_factor,
            p[f"experts.{up}_proj"],
            p["experts.down_proj"],
            p.get(f"experts.{up}_bias"),
            p.get("experts.down_bias"),
            c.activation,
        )
    )
    if c.shared_intermediate_size:
        shared = {name[len("shared_experts.") :]: t for name, t in p.items() if name.startswith("shared_experts.")}
        gate = x_TD @ shared["gate_proj.weight"].T + shared.get("gate_proj.bias", 0)
        hidden = x_TD @ shared["up_proj.weight"].T + shared.get("up_proj.bias", 0)
        hidden = gate / (1 + torch.exp(-gate)) * hidden
        y = y + hidden @ shared["down_proj.weight"].T + shared.get("down_proj.bias", 0)
    return y.view(x.shape)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True},
        {"gated": False, "activation": "relu2", "bias": True},
        {"norm_topk_prob": False},
        {"score_function": "sigmoid", "routed_scaling_factor": 2.5},
        {"score_function": "sigmoid", "norm_topk_prob": False},
        {"num_experts": 7, "top_k": 7, "intermediate_size": 5},
        {"shared_intermediate_size": 24},
        {"shared_intermediate_size": 24, "bias": True, "score_function": "sigmoid"},
        {"activation": "clamped_swiglu", "bias": True},
    ],
    ids=str,
)
def test_value_against_the_oracle(changes: dict, backend: str) -> None:
    layer = spread(MoE(config(backend=backend, **changes)))
    x = torch.randn(3, 5, 16)
    assert relative_error(layer(x).detach(), oracle(layer, x).detach()) <= 1e-5


def test_two_and_three_dims_agree() -> None:
    layer = spread(MoE(config()))
    x = torch.randn(2, 6, 16)
    assert torch.equal(layer(x).view(12, 16), layer(x.view(12, 16)))
    transposed = x.transpose(0, 1)
    torch.testing.assert_close(layer(transposed), layer(x).transpose(0, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16), (0, 3, 16)])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_tokens(shape: tuple[int, ...], backend: str) -> None:
    """An empty batch (an idle rank) gives an empty output and zero, not missing or NaN, gradients."""
    layer = MoE(config(backend=backend, shared_intermediate_size=8, bias=True))
    x = torch.empty(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("shape", [(16,), (2, 3, 4, 16), (3, 15)])
def test_wrong_input_shape_is_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"MoE input shape is \(.*: must be \[T, 16\] or \[B, S, 16\]"):
        MoE(config())(torch.zeros(shape))


def test_missing_width_is_named() -> None:
    with pytest.raises(ConfigError, match=r"moe.hidden_size is 0"):
        MoE(MoEConfig())


def test_autocast() -> None:
    """fp32 weights under bf16 autocast: bf16 out, fp32 gradients, and the same experts as without (fp32 router)."""
    layer = spread(MoE(config(shared_intermediate_size=8)))
    recorder = Recorder(layer)
    x = torch.randn(50, 16)
    want = layer(x).detach()
    recorder.update()
    counts = recorder.summary()[""].tokens_per_expert
    recorder.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        recorder.update()
    assert y.dtype == torch.bfloat16
    assert recorder.summary()[""].tokens_per_expert == counts
    assert relative_error(y.detach(), want) <= 2e-2
    y.sum().backward()
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


def test_router_works_in_fp32_inside_a_bf16_model() -> None:
    layer = MoE(config(), dtype=torch.bfloat16)
    x = torch.randn(20, 16).bfloat16()
    routing = layer.router(x)
    assert {t.dtype for t in routing[:4]} == {torch.int64, torch.float32}
    want = torch.softmax(x.double() @ layer.router.weight.double().T, dim=1)
    assert relative_error(routing.scores_TE.detach(), want.detach()) <= 1e-6


def test_fp64_layer_is_computed_in_fp64() -> None:
    layer = spread(MoE(config(), dtype=torch.float64))
    x = torch.randn(9, 16, dtype=torch.float64)
    assert relative_error(layer(x).detach(), oracle(layer, x).detach()) <= 1e-14


def test_functional_call_and_func_grad() -> None:
    layer = spread(MoE(config(bias=True, shared_intermediate_size=8)))
    x = torch.randn(9, 16)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, p, (x,)).square().sum()

    functional = grad(loss)(parameters)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(functional[name], p.grad, rtol=1e-6, atol=1e-6)
    zeros = {name: torch.zeros_like(p) for name, p in parameters.items()}
    assert not functional_call(layer, zeros, (x,)).any()


def test_deepcopy_is_independent() -> None:
    layer = spread(MoE(config()))
    recorder = Recorder(layer)
    twin = copy.deepcopy(layer)
    x = torch.randn(5, 16)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.experts.down_proj.zero_()
        twin.router.weight.zero_()
    recorder.update()
    before = recorder.summary()
    twin(x + 1)
    recorder.reset()
    recorder.update()
    assert recorder.summary() == before
    assert layer(x).any()


@pytest.mark.parametrize("changes", [{}, {"gated": False, "bias": True}, {"bias": True, "shared_intermediate_size": 8}])
def test_state_dict_round_trip(changes: dict) -> None:
    layer = spread(MoE(config(**changes)))
    Recorder(layer)  # statistics are no part of the state
    state = layer.state_dict()
    other = MoE(config(**changes))
    other.load_state_dict(state)
    x = torch.randn(5, 16)
    assert torch.equal(other(x), layer(x))
    on_meta = MoE(config(**changes), device="meta")
    on_meta.load_state_dict(state, assign=True)
    assert torch.equal(on_meta(x), layer(x))


def test_parameter_names_are_an_interface() -> None:
    names = {
        "router.weight": (4, 16),
        "experts.gate_up_proj": (4, 16, 16),
        "experts.down_proj": (4, 16, 8),
        "experts.gate_up_bias": (4, 16),
        "experts.down_bias": (4, 16),
        "shared_experts.gate_proj.weight": (6, 16),
        "shared_experts.gate_proj.bias": (6,),
        "shared_experts.up_proj.weight": (6, 16),
        "shared_experts.up_proj.bias": (6,),
        "shared_experts.down_proj.weight": (16, 6),
        "shared_experts.down_proj.bias": (16,),
    }
    layer = MoE(config(bias=True, shared_intermediate_size=6))
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == names
    plain = MoE(config(gated=False))
    assert {name: tuple(t.shape) for name, t in plain.state_dict().items()} == {
        "router.weight": (4, 16),
        "experts.up_proj": (4, 8, 16),
        "experts.down_proj": (4, 16, 8),
    }


def test_meta_then_materialise() -> None:
    direct = MoE(config(bias=True, shared_intermediate_size=8))
    direct.reset_parameters(seed=3)
    late = MoE(config(bias=True, shared_intermediate_size=8), device="meta")
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu")
    for p in late.parameters():
        nn.init.constant_(p, float("nan"))
    late.reset_parameters(seed=3)
    for (name, a), b in zip(direct.named_parameters(), late.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_initial_weights_have_the_asked_spread() -> None:
    layer = MoE(config(hidden_size=64, intermediate_size=128, bias=True))
    layer.reset_parameters(std=0.5, output_std=0.1, seed=1)
    assert layer.router.weight.std().item() == pytest.approx(0.5, rel=0.2)
    assert layer.experts.gate_up_proj.std().item() == pytest.approx(0.5, rel=0.02)
    assert layer.experts.down_proj.std().item() == pytest.approx(0.1, rel=0.02)
    assert not layer.experts.gate_up_bias.any()
    assert not layer.experts.down_bias.any()


def test_moe_layers_finds_every_layer() -> None:
    model = nn.Sequential(MoE(config()), nn.Linear(16, 16), nn.Sequential(MoE(config())))
    assert list(moe_layers(model)) == ["0", "2.0"]
