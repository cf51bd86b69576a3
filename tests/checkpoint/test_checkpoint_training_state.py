"""Training continues bit for bit after a load into fresh objects."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from dmoe.checkpoint import (
    capture_rng,
    load_latest,
    load_model_weights,
    restore_rng,
    restore_training_state,
    save_checkpoint,
    training_state,
)
from dmoe.errors import ConfigError, RunError


class Tiny(nn.Module):
    """Tied embeddings, a frozen layer, a layer that gets no gradient, a buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width)
        self.frozen = nn.Linear(width, width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5), nn.Linear(width, width))
        self.unused = nn.Linear(width, width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("counter", torch.zeros(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.counter += 1
        return self.head(self.block(self.frozen(self.embed(ids))))


def make(seed: int, *, compiled: bool = False, tensor_lr: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tiny()
    if compiled:
        model.block = torch.compile(model.block, backend="eager")
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2]
    plain = [p for n, p in model.named_parameters() if p.ndim == 1]
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 0.02}]
    return model, torch.optim.AdamW(groups, lr=lr, foreach=False)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, index: int) -> None:
    ids = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(index))
    loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0.7
    optimizer.step()


def bits(tree: object) -> object:
    """A nested state as plain Python, tensors by their bytes."""
    if isinstance(tree, torch.Tensor):
        return (
            str(tree.dtype),
            tuple(tree.shape),
            bytes(tree.detach().contiguous().flatten().view(torch.uint8).tolist()),
        )
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    return [bits(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize(("first_compiled", "then_compiled"), [(False, False), (True, False), (False, True)])
def test_two_steps_save_load_one_step_equals_three_steps(tmp_path, first_compiled, then_compiled, tensor_lr):
    straight = make(1, compiled=first_compiled, tensor_lr=tensor_lr)
    torch.manual_seed(5)
    for index in range(3):
        step(*straight, index)

    model, optimizer = make(1, compiled=first_compiled, tensor_lr=tensor_lr)
    torch.manual_seed(5)
    step(model, optimizer, 0)
    step(model, optimizer, 1)
    save_checkpoint(tmp_path, 2, {**training_state(model, optimizer), "rng": capture_rng(), "trainer": {"lr": 1}})

    model, optimizer = make(99, compiled=then_compiled, tensor_lr=tensor_lr)
    state = {**training_state(model, optimizer), "rng": capture_rng()}
    assert load_latest(tmp_path, state, on_refused=pytest.fail) == (2, {"lr": 1})
    restore_training_state(model, optimizer, state)
    assert restore_rng(state["rng"]) == []
    assert model.head.weight is model.embed.weight
    step(model, optimizer, 2)

    resumed, expected = training_state(model, optimizer), training_state(*straight)
    assert bits(resumed) == bits(expected)
    assert {int(s["step"]) for n, s in resumed["optimizer"]["state"].items() if "unused" not in n} == {3}
    names = resumed["optimizer"]["state"].keys()
    assert "embed.weight" in names
    assert not {"head.weight", "frozen.weight"} & names
    assert not any("_orig_mod" in name for name in [*names, *resumed["model"]])


def test_asking_for_the_state_before_training_changes_nothing():
    """Also with gradients present: torch's own initialisation leaves step counts at 1, or skips."""
    reference, asked = make(3), make(3)
    before = bits(asked[0].state_dict())
    state = training_state(*asked)
    assert bits(asked[0].state_dict()) == before
    assert all(int(s["step"]) == 0 for s in state["optimizer"]["state"].values())
    assert all(p.grad is None for p in asked[0].parameters())
    for model, optimizer in (reference, asked):
        torch.manual_seed(0)
        step(model, optimizer, 0)
    assert bits(reference[0].state_dict()) == bits(asked[0].state_dict())

    model, optimizer = make(4)
    model(torch.zeros(2, 2, dtype=torch.long)).sum().backward()
    gradients = [copy.deepcopy(p.grad) for p in model.parameters()]
    assert training_state(model, optimizer)["optimizer"]["state"].keys() >= {"embed.weight", "unused.bias"}
    assert bits(gradients) == bits([p.grad for p in model.parameters()])


def test_restore_from_a_copy_on_other_storage():
    source, target = make(1), make(2)
    for index in range(2):
        step(*source, index)
    saved = copy.deepcopy(training_state(*source))
    restore_training_state(*target, saved)
    assert bits(training_state(*target)) == bits(saved)
    step(*target, 2)
    assert bits(training_state(*target)) != bits(saved)
    assert bits(training_state(*source)) == bits(saved), "the copy is shared with the source"


def test_an_empty_group_between_others(tmp_path):
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(4, 4)
        groups = [{"params": [model.weight], "lr": 0.1}, {"params": [], "lr": 0.2}, {"params": [model.bias], "lr": 0.3}]
        return model, torch.optim.AdamW(groups)

    saved = training_state(*build(1))
    save_checkpoint(tmp_path, 1, saved)
    model, optimizer = build(2)
    for group in optimizer.param_groups:
        group["lr"] = 9.0
    state = training_state(model, optimizer)
    load_latest(tmp_path, state, on_refused=pytest.fail)
    restore_training_state(model, optimizer, state)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert bits(training_state(model, optimizer)) == bits(saved)


def test_other_grouping_or_model_is_named(tmp_path):
    saved = copy.deepcopy(training_state(*make(1)))
    model = make(1)[0]
    with pytest.raises(ConfigError, match=r"optimizer\.param_groups has length 1: must be 2"):
        restore_training_state(model, torch.optim.AdamW(model.parameters()), saved)
    *parameters, last = model.parameters()
    regrouped = torch.optim.AdamW([{"params": parameters}, {"params": [last]}])
    with pytest.raises(ConfigError, match=r"optimizer\.param_groups\.0 differs from .* in block\.0\.bias"):
        restore_training_state(model, regrouped, saved)
    save_checkpoint(tmp_path, 1, saved)
    with pytest.raises(ConfigError, match=r"model\.\S+ has shape"):
        load_model_weights(tmp_path, Tiny(width=4))


def test_load_model_weights_for_generation(tmp_path):
    model, optimizer = make(1)
    for index in (1, 2):
        step(model, optimizer, index)
        save_checkpoint(tmp_path, index, training_state(model, optimizer))
        if index == 1:
            first = bits(model.state_dict())
    fresh = make(2)[0]
    assert load_model_weights(tmp_path, fresh) == 2
    assert bits(fresh.state_dict()) == bits(model.state_dict())
    assert load_model_weights(tmp_path / "checkpoints" / "step-00000001", fresh) == 1
    assert bits(fresh.state_dict()) == first

    half = make(3)[0].bfloat16()
    load_model_weights(tmp_path, half)
    assert torch.equal(half.embed.weight, model.embed.weight.bfloat16())

    newest = tmp_path / "checkpoints" / "step-00000002"
    (newest / "trainer.json").write_text("{")
    with pytest.warns(UserWarning, match=r"step-00000002 is refused: .*trainer\.json is truncated"):
        assert load_model_weights(tmp_path, fresh) == 1
    with pytest.raises(RunError, match="truncated"):
        load_model_weights(newest, fresh)
    with pytest.raises(ConfigError, match=r"checkpoint is '.*nowhere': must be a checkpoint folder or a run folder"):
        load_model_weights(tmp_path / "nowhere", fresh)
    with torch.device("meta"), pytest.raises(ValueError, match="meta device"):
        load_model_weights(tmp_path, Tiny())


def draw() -> list[object]:
    # An odd number of normal deviates leaves one pending in random and numpy.
    return [torch.rand(2).tolist(), random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand()]


@pytest.mark.parametrize("pending", [False, True])
def test_random_states_round_trip_through_a_checkpoint(tmp_path, pending):
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(11)
    if pending:
        draw()
    save_checkpoint(tmp_path, 1, {"rng": capture_rng()})
    expected = [draw() for _ in range(3)]
    for generator in (torch.manual_seed, random.seed, np.random.seed):
        generator(12)
    random.gauss(0, 1)
    state = {"rng": capture_rng()}
    load_latest(tmp_path, state, on_refused=pytest.fail)
    assert restore_rng(state["rng"]) == []
    assert [draw() for _ in range(3)] == expected


def test_generators_without_a_saved_state_are_named_and_left_alone(tmp_path):
    saved = capture_rng()
    del saved["rank0"]["numpy"]
    saved["rank1"] = dict(saved["rank0"])
    save_checkpoint(tmp_path, 1, {"rng": saved})
    state = {"rng": capture_rng()}
    load_latest(tmp_path, state, on_refused=pytest.fail)
    before = bits(capture_rng()["rank0"]["numpy"])
    assert restore_rng(state["rng"]) == ["numpy"]
    assert bits(capture_rng()["rank0"]["numpy"]) == before
