"""Rules of choosing and dropping inside the layer: against loops over tokens, experts and picks."""

import dataclasses
import math

import pytest
import torch
from dense_oracle import relative_error
from torch import Tensor

from dmoe.errors import ConfigError
from dmoe.moe import MoE, MoEConfig, Recorder, record_routing, replay_routing
from dmoe.moe.replay import RoutingTrace

D, E, K, T = 16, 6, 2, 25


def build(**changes: object) -> MoE:
    config = {"hidden_size": D, "intermediate_size": 8, "num_experts": E, "top_k": K, "backend": "reference"}
    torch.manual_seed(0)
    layer = MoE(MoEConfig(**{**config, **changes}))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.4)
    return layer


def again(layer: MoE, **changes: object) -> MoE:
    """The same weights under another config."""
    other = MoE(dataclasses.replace(layer.config, **changes))
    other.load_state_dict(layer.state_dict())
    return other


def one_expert(layer: MoE, e: int, x: Tensor) -> Tensor:
    gate, up = (layer.experts.gate_up_proj[e].double() @ x.double()).chunk(2)
    return layer.experts.down_proj[e].double() @ (torch.nn.functional.silu(gate) * up)


def by_hand(layer: MoE, x: Tensor, picks: list[tuple[int, int, float]]) -> Tensor:
    """Sum over (token, expert, weight)."""
    y = torch.zeros_like(x, dtype=torch.float64)
    for t, e, weight in picks:
        y[t] += weight * one_expert(layer, e, x[t])
    return y


def picks_of(layer: MoE, x: Tensor) -> list[tuple[int, int, float]]:
    """In the order of tokens and picks, without the id E."""
    routing = layer.router(x)
    pairs = zip(routing.topk_ids_TK.tolist(), routing.topk_weights_TK.tolist())
    return [(t, e, w) for t, (ids, ws) in enumerate(pairs) for e, w in zip(ids, ws) if e < E]


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize("factor", [0.4, 1.0, 8.0])
@pytest.mark.parametrize("padded", [False, True])
def test_capacity(policy: str, factor: float, padded: bool) -> None:
    free, x = build(), torch.randn(T, D)
    with torch.no_grad():
        free.router.weight[0] *= 3  # skew
    layer = again(free, capacity_factor=factor, drop_policy=policy, pad_to_capacity=padded)
    room = min(T, math.ceil(T * K / E * factor))
    wanted, kept = picks_of(free, x), []
    for e in range(E):
        mine = [p for p in wanted if p[1] == e]
        if policy == "probs":
            mine.sort(key=lambda p: -p[2])
        kept += mine[:room]
    assert (len(kept) < len(wanted)) == (factor < 2)
    recorder = Recorder(layer)
    y = layer(x)
    recorder.update()
    torch.testing.assert_close(y.double(), by_hand(layer, x, kept), atol=1e-5, rtol=1e-5)
    summary = recorder.summary()[""]
    assert summary.dropped == len(wanted) - len(kept)
    assert summary.tokens_per_expert == [sum(p[1] == e for p in wanted) for e in range(E)]
    if factor == 8.0:
        assert torch.equal(y, free(x))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_to_capacity_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    plain = build(backend=backend, capacity_factor=0.7, shared_intermediate_size=8).to(dtype)
    padded = again(plain, pad_to_capacity=True).to(dtype)
    for name, buffer in padded.named_parameters():
        buffer.data = dict(plain.named_parameters())[name].detach().clone()
    results = []
    for layer in (plain, padded):
        x = torch.randn(T, D, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    # In bf16 a pick's result is rounded before it is added.
    for a, b in zip(*results):
        assert relative_error(a, b) <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_expert_choice() -> None:
    layer, x = build(routing="expert_choice", routed_scaling_factor=2.0, shared_intermediate_size=8), torch.randn(T, D)
    scores = (x.double() @ layer.router.weight.double().T).softmax(-1)
    room = math.ceil(T * K / E)
    picks = [(t, e, 2 * scores[t, e].item()) for e in range(E) for t in scores[:, e].argsort(descending=True)[:room]]
    recorder = Recorder(layer)
    y = layer(x)
    recorder.update()
    want = by_hand(layer, x, picks) + layer.shared_experts(x).double()
    torch.testing.assert_close(y.double(), want, atol=1e-5, rtol=1e-5)
    assert recorder.summary()[""].tokens_per_expert == [room] * E
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer(x[:0]).shape == (0, D)
    few = again(layer, capacity_factor=0.2)
    assert few.router(x).slots.tokens_EC.shape == (E, math.ceil(T * K / E * 0.2))


@pytest.mark.parametrize("routing", ["expert_choice", "topk"])
def test_gradients_of_slots(routing: str) -> None:
    """fp64, by finite differences: of x, through the weights too."""
    config = {"routing": routing, "aux_loss_coef": 0.0, "z_loss_coef": 0.0, "norm_topk_prob": False}
    config |= {"capacity_factor": 0.6, "pad_to_capacity": routing == "topk"}
    layer = build(**config).double()
    x = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("routing", ["hash", "random", "uniform", "sinkhorn"])
def test_weights_of_chosen_experts(routing: str) -> None:
    layer, x = build(routing=routing, routed_scaling_factor=1.5), torch.randn(T, D)
    ids = torch.randint(0, 50, (T,))
    routing_of_x = layer.router(x, token_ids_T=ids)
    chosen, weights = routing_of_x.topk_ids_TK, routing_of_x.topk_weights_TK
    scores = (x.double() @ layer.router.weight.double().T).softmax(-1).gather(1, chosen)
    torch.testing.assert_close(weights.double(), 1.5 * scores / scores.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)
    assert (chosen.sort(1).values.diff() > 0).all()
    if routing == "hash":
        same = ids.unsqueeze(0) == ids.unsqueeze(1)
        assert ((chosen.unsqueeze(0) == chosen.unsqueeze(1)).all(-1) >= same).all()
        layer.router.hash_seed = 1
        assert not torch.equal(layer.router(x, token_ids_T=ids).topk_ids_TK, chosen)
        with pytest.raises(ConfigError, match="token_ids is None"):
            layer(x)
        assert layer(x, token_ids=ids).shape == x.shape
    if routing == "uniform":
        assert chosen.flatten().tolist() == [i % E for i in range(T * K)]
    if routing == "sinkhorn":
        assert torch.bincount(chosen.flatten(), minlength=E).max() <= 2 * T * K / E
        plain = layer.eval().router(x)
        assert torch.equal(plain.topk_ids_TK, again(layer, routing="topk").router(x).topk_ids_TK)


def test_router_with_bias_jitter_and_fp64() -> None:
    x = torch.randn(T, D)
    layer = build(router_bias=True, router_dtype="fp64", jitter_eps=0.2)
    want = x.double() @ layer.router.weight.double().T + layer.router.bias.double()
    routing = layer.eval().router(x)
    assert routing.logits_TE.dtype == torch.float64
    torch.testing.assert_close(routing.logits_TE, want, atol=1e-12, rtol=0)
    layer.train()
    layer(x).sum().backward()
    assert layer.router.bias.grad.any()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(E, D))
        layer.router.bias.zero_()
    noise = layer.router(torch.ones(400, D)).logits_TE
    assert 0.8 <= noise.min() < 0.81
    assert 1.19 < noise.max() <= 1.2
    assert abs(noise.mean() - 1) < 0.01
    assert (layer.eval().router(torch.ones(400, D)).logits_TE == 1).all()


def test_latent_experts_and_gated_shared_expert() -> None:
    layer = build(latent_size=8, shared_intermediate_size=8, shared_expert_gate=True)
    assert layer.experts.down_proj.shape == (E, 8, 8)
    x = torch.randn(T, D)
    latent = x @ layer.fc1_latent_proj.weight.T
    routed = by_hand(layer, latent, picks_of(layer, x)).float() @ layer.fc2_latent_proj.weight.T
    gate = 1 / (1 + torch.exp(-x @ layer.shared_expert_gate.weight.T))
    torch.testing.assert_close(layer(x), routed + gate * layer.shared_experts(x), atol=1e-5, rtol=1e-5)
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_replay(tmp_path) -> None:
    layer, x = build(), torch.randn(T, D)
    model = torch.nn.Sequential(layer, build())
    with record_routing(model) as trace:
        first = [model(x), model(2 * x)]
    assert layer.router.replay is None
    trace.save(tmp_path / "trace.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["trace.safetensors"]
    loaded = RoutingTrace.load(tmp_path / "trace.safetensors")
    with replay_routing(model, loaded):
        for again_x, y in zip((x, 2 * x), first):
            assert torch.equal(model(again_x), y)
    with torch.no_grad():
        layer.router.weight.copy_(layer.router.weight.flip(0))  # would choose others now
    old_ids = trace.layers["0"][0]
    with replay_routing(model, loaded):
        model[0](x).sum().backward()
    scores = (x.double() @ layer.router.weight.double().T).softmax(-1).gather(1, old_ids)
    weights = scores / scores.sum(1, keepdim=True)
    picks = [(t, e, w) for t in range(T) for e, w in zip(old_ids[t].tolist(), weights[t].tolist())]
    with replay_routing(model, loaded):
        torch.testing.assert_close(layer(x).double(), by_hand(layer, x, picks), atol=1e-5, rtol=1e-5)
    assert layer.router.weight.grad.any()


def test_replay_under_checkpointing() -> None:
    """Two micro-batches in flight: a recomputed forward is recorded once and gets the choices of its own."""
    layer, batches = build(), [torch.randn(T, D), torch.randn(T, D)]

    def step() -> Tensor:
        layer.zero_grad(set_to_none=True)
        outputs = []
        for x in batches:
            if x.numel():
                outputs.append(torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
            else:
                with torch.no_grad():
                    layer(batches[0])
        for y in outputs:
            y.square().sum().backward()
        return layer.experts.down_proj.grad.clone()

    with record_routing(layer) as trace:
        want = step()
    assert len(trace.layers[""]) == 2
    trace.layers[""].insert(1, trace.layers[""][0].flip(1))  # of a forward in between, without a backward
    batches.insert(1, torch.empty(0))
    with replay_routing(layer, trace):
        assert torch.equal(step(), want)


def test_replay_refuses_what_does_not_fit() -> None:
    layer, x = build(), torch.randn(T, D)
    with record_routing(layer) as trace:
        layer(x)
    with replay_routing(layer, trace):
        layer(x)
        with pytest.raises(ConfigError, match=r"forward 2 of the layer: the routing trace has 1"):
            layer(x)
    with replay_routing(layer, trace), pytest.raises(ConfigError, match=r"shape \(25, 2\): must be \(24, 2\)"):
        layer(x[1:])
    trace.layers[""][0][3, 1] = E
    with pytest.raises(ConfigError, match="has expert 6: must be from 0 to 5"), replay_routing(layer, trace):
        pass
    other = torch.nn.Sequential(layer)
    with pytest.raises(ConfigError, match=r"has layers \[''\]: must be \['0'\]"), replay_routing(other, trace):
        pass
    chooser = build(routing="expert_choice")
    with pytest.raises(ConfigError, match="expert_choice"), record_routing(chooser):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 4}, "moe.n_group is 4: must be a divisor of 6"),
        ({"n_group": 3, "topk_group": 4}, "moe.topk_group is 4: must be at most"),
        ({"n_group": 6, "topk_group": 1}, "moe.top_k is 2: must be at most the 1 experts"),
        ({"n_group": 3, "topk_group": 2, "group_score_top": 3}, "moe.group_score_top is 3: must be at most 2"),
        (
            {"routing": "hash", "expert_bias_rate": 0.1},
            'expert_bias_rate is 0.1: must be 0.0 with moe.routing "hash"',
        ),
        ({"softmax_after_topk": True, "score_function": "sigmoid"}, "moe.score_function is 'sigmoid': must be"),
        ({"pad_to_capacity": True}, "moe.capacity_factor is 0.0: must be greater than 0"),
        ({"shared_expert_gate": True}, "moe.shared_intermediate_size is 0: must be greater than 0"),
        ({"routing": "expert_choice", "seq_aux_loss_coef": 0.1}, "moe.seq_aux_loss_coef is 0.1: must be 0.0"),
        ({"jitter_eps": 1.0}, "moe.jitter_eps is 1.0: must be in"),
        ({"routing": "best"}, "moe.routing is 'best': must be one of topk"),
    ],
)
def test_config_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        MoEConfig(hidden_size=D, num_experts=E, top_k=K, **changes)


def test_input_errors() -> None:
    layer, x = build(), torch.randn(2, 3, D)
    with pytest.raises(ConfigError, match=r"token_mask shape is \(2, 4\): must be \(2, 3\)"):
        layer(x, token_mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ConfigError, match=r"token_mask dtype is torch.int64: must be torch.bool"):
        layer(x, token_mask=torch.ones(2, 3, dtype=torch.int64))


def test_simple_use() -> None:
    layer = MoE(MoEConfig(hidden_size=32, expert_hidden_size=24, num_experts=8, top_k=2))
    assert layer.experts.down_proj.shape == (8, 32, 24)
    assert layer(torch.randn(2, 5, 32)).shape == (2, 5, 32)
