"""Adapters on a whole model: gradients, zero at first, merging, what is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lora_oracle import ALL, CONFIG, base_model, effective_weights, lora_train, randomize_B
from torch.func import functional_call

from dmoe.config import OptimConfig
from dmoe.errors import ConfigError
from dmoe.lora import adapted_modules, add_adapters, check_trainable, make_trainable, merge
from dmoe.moe.packed import pack_experts
from dmoe.train.engine import Batch, Engine
from dmoe.train.optim import build_optimizer
from dmoe.train.step import training_step


def tokens() -> torch.Tensor:
    return torch.randint(0, CONFIG.vocab_size, (4, 17), generator=torch.Generator().manual_seed(3))


def batch() -> Batch:
    return Batch(tokens()[:, :-1].contiguous(), tokens()[:, 1:].contiguous())


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "layers.2.*.down_proj"), ("experts",)], ids=str)
def test_gradients_are_those_of_effective_weights(targets: tuple[str, ...]) -> None:
    model = base_model(dtype=torch.float64)
    make_trainable([model], lora_train(targets))
    randomize_B(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    model.loss(*_inputs()).backward()
    plain = base_model(dtype=torch.float64)
    wanted = torch.autograd.grad(
        _loss(functional_call(plain, effective_weights(model), (_inputs()[0],))), list(trained.values())
    )
    for (name, parameter), gradient in zip(trained.items(), wanted):
        assert parameter.grad is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-13, msg=name)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return batch().inputs, batch().targets


def _loss(logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch().targets.flatten())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_first_loss_is_that_of_the_base_to_the_bit(precision: str) -> None:
    losses = []
    for rank in (0, 3):
        train = replace(lora_train(rank=rank), precision=precision, batch_size=4, micro_batch_size=4)
        model = base_model()
        make_trainable([model], train)
        losses.append(Engine([model], train, torch.device("cpu")).forward_backward(batch()))
    assert torch.equal(*losses)


def test_only_adapters_are_trained_and_the_base_stays() -> None:
    train = replace(lora_train(), batch_size=4, micro_batch_size=2)
    config = replace(CONFIG, moe=replace(CONFIG.moe, expert_bias_rate=0.1))
    model = base_model(config)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    make_trainable([model], train)
    engine = Engine([model], train, torch.device("cpu"))
    optimizer = build_optimizer([model], OptimConfig(lr=0.01))
    results = [training_step(engine, optimizer, batch(), OptimConfig(lr=0.01)) for _ in range(8)]
    assert results[-1].loss < results[0].loss
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # the biases of the choice too
    with_state = {p for group in optimizer.param_groups for p in group["params"]}
    assert with_state == set(optimizer.state) == set(engine.parameters)
    gradients = [p.grad for p in model.parameters() if not p.requires_grad]
    assert gradients.count(None) == len(gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_merged_is_what_it_was(dtype: torch.dtype) -> None:
    config = replace(CONFIG, moe=replace(CONFIG.moe, gated=dtype == torch.float64, activation="gelu"))
    model = base_model(config, dtype)
    names, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    add_adapters(model, lora_train().lora)
    randomize_B(model)
    logits, wanted = model.eval()(batch().inputs), effective_weights(model)
    assert merge(model) == 3 * 4 + 3 + 2 * 3 + 2 + 2 - (2 if dtype == torch.bfloat16 else 0)
    assert merge(model) == 0
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (names, kinds)
    for name, parameter in model.named_parameters():
        rounding = torch.finfo(dtype).eps * 2
        torch.testing.assert_close(parameter, wanted[name], rtol=rounding, atol=rounding)
    error = (model(batch().inputs) - logits).abs().max().item()
    assert error <= (1e-12 if dtype == torch.float64 else 0.3) * logits.abs().max().item()


def test_values_of_factors_are_seeded_by_name() -> None:
    one, other = base_model(), base_model()
    add_adapters(one, lora_train().lora, seed=5)
    add_adapters(other, lora_train(("experts",)).lora, seed=5)
    factors = dict(one.named_parameters())
    ours = {name: p for name, p in other.named_parameters() if "lora_" in name}
    assert len(ours) == 8
    assert all(torch.equal(factors[name], p) for name, p in ours.items())
    A = torch.cat([p.flatten() for name, p in factors.items() if name.endswith("q_proj.lora_A")])
    assert abs(A.std().item() * (3 * 16) ** 0.5 - 1) < 0.2


def test_dropout_is_for_training_alone() -> None:
    model = base_model()
    add_adapters(model, lora_train(("attention",), dropout=0.5).lora)
    plain = base_model()
    add_adapters(plain, lora_train(("attention",)).lora)
    randomize_B(model), randomize_B(plain)
    wanted = plain(batch().inputs)
    assert torch.equal(model.eval()(batch().inputs), wanted)
    assert not torch.equal(model.train()(batch().inputs), wanted)


def test_adapted_experts_are_not_packed() -> None:
    config = replace(CONFIG, hidden_size=1024, moe=replace(CONFIG.moe, intermediate_size=1024, bias=False))
    model = base_model(replace(config, num_layers=2))
    add_adapters(model, lora_train(("experts",)).lora)
    assert pack_experts(model) == 0


def test_a_compiled_layer_computes_the_same() -> None:
    losses = []
    for compiles in (False, True):
        train = replace(lora_train(), batch_size=4, micro_batch_size=4)
        model = base_model()
        make_trainable([model], train)
        randomize_B(model)
        if compiles:
            model.blocks[1].compile(fullgraph=True, backend="aot_eager")
        engine = Engine([model], train, torch.device("cpu"))
        engine.forward_backward(batch())
        losses.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in losses[0].items():
        torch.testing.assert_close(losses[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("targets", "fields", "words"),
    [
        (("attentoin",), {}, "train.lora.targets is 'attentoin': must be .* such as attention"),
        (("layers.9.mlp",), {}, "train.lora.targets is 'layers.9.mlp'"),
        (("experts",), {"dropout": 0.1}, "train.lora.dropout is 0.1: must be 0.0 with adapters on experts"),
    ],
)
def test_bad_requests(targets: tuple[str, ...], fields: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_trainable(CONFIG, lora_train(targets, **fields))


def test_what_has_adapters() -> None:
    model = base_model()
    add_adapters(model, lora_train(("q_proj", "experts")).lora)
    assert set(adapted_modules(model)) == {
        "layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj", "layers.1.mlp.experts",
        "layers.2.mlp.experts",
    }  # fmt: skip
