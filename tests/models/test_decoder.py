"""`Decoder`: causality, tying, materialising, initial weights, counting, checkpointing, compilation."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from dense_oracle import relative_error
from torch import Tensor, nn

from dmoe.config import ModelConfig, MoEConfig
from dmoe.errors import ConfigError
from dmoe.models import Decoder, count_parameters
from dmoe.moe import FeedForward, MoE, Recorder

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    max_seq_len=32,
    first_k_dense=1,
    moe=MoEConfig(intermediate_size=24, num_experts=4, top_k=2, aux_loss_coef=0.1, z_loss_coef=0.1),
)


def build(config: ModelConfig = CONFIG) -> Decoder:
    """A model whose attention and routing are far from uniform."""
    model = Decoder(config)
    model.init_weights(seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(10)
    return model


def training_gradients(model: Decoder, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_later_tokens_do_not_change_earlier_logits(backend: str) -> None:
    model = build(replace(CONFIG, moe=replace(CONFIG.moe, backend=backend))).eval()
    ids = torch.randint(0, 61, (2, 20))
    with torch.no_grad():
        want = model(ids)
        for position in (0, 7, 19):
            changed = ids.clone()
            changed[:, position] = (changed[:, position] + 1) % 61
            got = model(changed)
            assert relative_error(got[:, :position], want[:, :position]) <= 2e-6
            assert (got[:, position:] - want[:, position:]).abs().amax(dim=(0, 2)).min() > 1e-3
            shorter = model(ids[:, : position + 1])
            assert relative_error(shorter, want[:, : position + 1]) <= 2e-6


def test_sequences_of_a_batch_are_independent() -> None:
    model = build().eval()
    ids = torch.randint(0, 61, (3, 12))
    with torch.no_grad():
        assert relative_error(model(ids[1:2]), model(ids)[1:2]) <= 2e-6


def test_positions_matter() -> None:
    model = build().eval()
    repeated = torch.tensor([[3, 9, 9, 3, 9, 3]])
    logits = model(repeated)[0]
    assert not torch.allclose(logits[1], logits[2], atol=1e-3)


def test_too_long_a_sequence_is_named() -> None:
    with pytest.raises(ConfigError, match=r"sequence length is 33: must be at most model.max_seq_len \(32\)"):
        build()(torch.zeros(1, 33, dtype=torch.int64))


def test_which_layers_are_mixtures() -> None:
    def kinds(**changes: int) -> str:
        model = Decoder.on_meta(replace(CONFIG, num_layers=6, **changes))
        return "".join("M" if isinstance(layer.mlp, MoE) else "d" for layer in model.layers)

    assert kinds(first_k_dense=0) == "MMMMMM"
    assert kinds(first_k_dense=2) == "ddMMMM"
    assert kinds(first_k_dense=0, moe_layer_freq=2) == "MdMdMd"
    assert kinds(first_k_dense=1, moe_layer_freq=2) == "ddMdMd"
    assert kinds(moe_layer_freq=0) == "dddddd"


def test_loss_is_the_cross_entropy() -> None:
    model, ids = build(), torch.randint(0, 61, (2, 9))
    logits = model(ids[:, :-1]).double()
    probs = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    nats = -torch.log(probs.gather(2, ids[:, 1:].unsqueeze(2)))
    assert model.loss(ids[:, :-1], ids[:, 1:]).item() == pytest.approx(nats.mean().item(), rel=1e-5)
    assert model.loss(ids[:, :-1], ids[:, 1:], reduction="sum").item() == pytest.approx(nats.sum().item(), rel=1e-5)


def test_tied_and_untied_head() -> None:
    tied, untied = build(), build(replace(CONFIG, tie_embeddings=False))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.num_params() == tied.num_params() + 61 * 32
    assert not torch.equal(untied.lm_head.weight, untied.embed_tokens.weight)
    untied.load_state_dict(tied.state_dict())
    ids = torch.randint(0, 61, (2, 9))
    assert torch.equal(untied(ids), tied(ids))
    _, tied_grads = training_gradients(tied, ids)
    _, untied_grads = training_gradients(untied, ids)
    both = untied_grads["lm_head.weight"] + untied_grads["embed_tokens.weight"]
    assert relative_error(tied_grads["embed_tokens.weight"], both) <= 1e-6


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_meta_then_materialise_equals_a_direct_build(tied: bool) -> None:
    config = replace(CONFIG, tie_embeddings=tied, moe=replace(CONFIG.moe, bias=True, shared_intermediate_size=8))
    direct, late = Decoder(config), Decoder.on_meta(config)
    assert all(p.is_meta for p in late.parameters())
    late.to_empty(device="cpu")
    assert (late.lm_head.weight is late.embed_tokens.weight) == tied
    for p in late.parameters():
        nn.init.constant_(p, float("nan"))
    for model in (direct, late):
        model.init_weights(seed=7)
    for (name, a), (_, b) in zip(direct.named_parameters(), late.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    ids = torch.randint(0, 61, (1, 9))
    assert torch.equal(direct(ids), late(ids))


def test_initial_weights_do_not_depend_on_other_parameters() -> None:
    """The same name and seed give the same values in a deeper, wider-vocabulary, untied model."""
    small = Decoder(CONFIG)
    large = Decoder(replace(CONFIG, num_layers=5, vocab_size=90, tie_embeddings=False))
    torch.manual_seed(1)
    small.init_weights(seed=7)
    torch.manual_seed(2)
    large.init_weights(seed=7)
    depth = math.sqrt(5 / 3)  # output projections are divided by sqrt(2 * layers)
    others = dict(large.named_parameters())
    for name, p in small.named_parameters():
        if name == "embed_tokens.weight":
            continue
        scale = depth if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")) else 1.0
        torch.testing.assert_close(others[name] * scale, p, rtol=1e-5, atol=1e-8, msg=name)
    before = [p.clone() for p in small.parameters()]
    small.init_weights(seed=8)
    changed = [not torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True)]
    assert changed == ["norm" not in name for name, _ in small.named_parameters()]
    values = torch.stack([p.flatten()[:8] for n, p in small.named_parameters() if "norm" not in n])
    assert len(values.unique(dim=0)) == len(values)  # no two parameters share a stream


def test_initial_spread() -> None:
    model = Decoder(replace(CONFIG, hidden_size=128, num_layers=2, init_std=0.05))
    model.init_weights()
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == 1).all(), name
        else:
            out = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
            assert p.std().item() == pytest.approx(0.025 if out else 0.05, rel=0.1), name


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_activation_checkpointing_changes_nothing(backend: str) -> None:
    model = build(replace(CONFIG, moe=replace(CONFIG.moe, backend=backend)))
    recorder = Recorder(model)
    ids = torch.randint(0, 61, (2, 13))
    results = []
    for model.activation_checkpointing in (False, True):
        results.append((*training_gradients(model, ids), recorder.update(), recorder.summary()))
        recorder.reset()
    (loss, grads, _, summary), (loss_2, grads_2, _, summary_2) = results
    assert loss == loss_2
    assert all(torch.equal(grads[name], grads_2[name]) for name in grads)
    assert summary == summary_2
    assert list(summary) == ["layers.1.mlp", "layers.2.mlp"]


def test_activation_checkpointing_recomputes() -> None:
    model = build()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.layers[0].register_forward_pre_hook(count)
    ids = torch.randint(0, 61, (2, 13))
    training_gradients(model, ids)
    assert calls == 1
    model.activation_checkpointing = True
    training_gradients(model, ids)
    assert calls == 1 + 2


def test_layers_compile_one_by_one() -> None:
    """As the training loop does it; also with checkpointing around the compiled layers."""
    eager = build(replace(CONFIG, num_layers=2))
    compiled = copy.deepcopy(eager)
    torch.compiler.reset()
    for layer in compiled.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for compiled.activation_checkpointing in (False, True):
        ids = torch.randint(0, 61, (2, 13))
        want_loss, want = training_gradients(eager, ids)
        got_loss, got = training_gradients(compiled, ids)
        assert got_loss == pytest.approx(want_loss, rel=1e-6)
        for name in want:
            assert relative_error(got[name], want[name]) <= 1e-5, name


def test_autocast_stays_close_to_fp32() -> None:
    model, ids = Decoder(replace(CONFIG, qk_norm="full")), torch.randint(0, 61, (2, 13))
    model.init_weights()
    want = model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = model(ids)
        loss = model.loss(ids, ids)
    assert got.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert relative_error(got.detach(), want.detach()) <= 3e-2
    loss.backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_feed_forward(gated: bool, activation: str) -> None:
    mlp = FeedForward(16, 24, activation=activation, gated=gated, bias=True)
    x = torch.randn(5, 16)
    act = {"silu": F.silu, "gelu": F.gelu, "relu2": lambda t: F.relu(t) ** 2}[activation]
    up = F.linear(x, mlp.up_proj.weight, mlp.up_proj.bias)
    if mlp.gate_proj is not None:
        hidden = act(F.linear(x, mlp.gate_proj.weight, mlp.gate_proj.bias)) * up
    else:
        hidden = act(up)
    torch.testing.assert_close(mlp(x), F.linear(hidden, mlp.down_proj.weight, mlp.down_proj.bias))


def test_parameters_by_hand() -> None:
    # Embedding 61 * 32, tied head. Per layer: two norms of 32; q and o 32 * 32, k and v 16 * 32, q_norm and k_norm 8.
    # Layer 0: dense, 3 * 32 * 40. Layers 1 and 2: router 4 * 32 and 4 experts of 3 * 32 * 24. Final norm 32.
    attention = 2 * 32 * 32 + 2 * 16 * 32 + 2 * 8
    expert = 3 * 32 * 24
    total = 61 * 32 + 3 * (2 * 32 + attention) + 3 * 32 * 40 + 2 * (4 * 32 + 4 * expert) + 32
    model = build()
    assert model.num_params() == total
    assert model.num_active_params() == total - 2 * 2 * expert  # 2 of 4 experts idle in 2 layers
    shared = build(replace(CONFIG, moe=replace(CONFIG.moe, shared_intermediate_size=10, bias=True)))
    biases = 4 * (48 + 32)
    shared_mlp = 3 * 32 * 10 + 10 + 10 + 32
    assert shared.num_params() == total + 2 * (biases + shared_mlp)
    assert shared.num_active_params() == total - 2 * 2 * expert + 2 * (biases // 2 + shared_mlp)
    assert count_parameters(CONFIG, 20) == {
        "num_params": total,
        "num_active_params": total - 4 * expert,
        # 6 a parameter (the tied embedding is the head), and 12 * layers * heads * head_dim * length / 2.
        "flops_per_token": 6 * (total - 4 * expert) + 12 * 3 * 4 * 8 * 20 / 2,
    }
