"""The weights that upcycling makes: dropped channels, noise, order of reading, bad requests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from upcycle_cases import CountingSource, dense_config, dense_model

from dmoe.checkpoint.upcycle import ModelSource, UpcycledSource, UpcyclePlan
from dmoe.config import ModelConfig
from dmoe.errors import ConfigError, RunError
from dmoe.models import Decoder


def experts(model: Decoder, plan: UpcyclePlan, layer: int = 0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """gate, up and down of each expert, all as [F, D]: a row a channel; down not scaled."""
    source = UpcycledSource(ModelSource(model), plan)
    scale = plan.routed_scale(model.config.intermediate_size)
    result = []
    for e in range(source.config.moe.num_experts):
        gate, up = source.read(f"layers.{layer}.mlp.experts.gate_up_proj", e).chunk(2)
        result.append((gate, up, source.read(f"layers.{layer}.mlp.experts.down_proj", e).T / scale))
    return result


def network(model: Decoder, layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    mlp = model.layers[layer].mlp
    return mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach(), mlp.down_proj.weight.detach().T


@pytest.mark.parametrize(
    ("width", "granularity", "ratio", "count"),
    [(24, 1, 0.5, 12), (24, 1, 0.3, 7), (24, 2, 0.3, 4), (20, 4, 0.5, 3), (24, 1, 1.0, 24), (24, 1, 0.0, 0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_draws_exactly_the_rounded_share_of_channels_anew(
    width: int, granularity: int, ratio: float, count: int, dtype: torch.dtype
) -> None:
    model = dense_model(dtype, intermediate_size=width)
    plan = UpcyclePlan(num_experts=3, top_k=1, granularity=granularity, method="drop", drop_ratio=ratio)
    size, sets = width // granularity, []
    for e, matrices in enumerate(experts(model, plan)):
        own = slice(size * (e % granularity), size * (e % granularity) + size)
        differs = [new != old[own] for new, old in zip(matrices, network(model))]
        changed = [numbers.any(dim=1) for numbers in differs]
        assert changed[0].sum() == count
        assert torch.equal(changed[0], changed[1])
        assert torch.equal(changed[0], changed[2])
        if count:  # whole channels, but for numbers that are the same by chance
            assert all(numbers[changed[0]].float().mean() > 0.9 for numbers in differs)
        sets.append(tuple(changed[0].tolist()))
    if 0 < count < size and size > 12:
        assert len(set(sets)) == len(sets)  # each expert has channels of its own


def test_dropped_channels_have_the_mean_and_deviation_of_what_they_replace() -> None:
    model = dense_model(torch.float32, hidden_size=512, intermediate_size=64, num_layers=1)
    with torch.no_grad():  # channels of different mean and size, so that which ones are drawn anew is seen in both
        for matrix, unit in zip(network(model), (1.0, 3.0, 10.0)):
            size = torch.logspace(-2, 1, 64)[torch.randperm(64)].unsqueeze(1)
            matrix.copy_(unit * size * (torch.randn(matrix.shape) + 0.7))
    plan = UpcyclePlan(num_experts=4, top_k=2, method="drop", drop_ratio=0.25)
    for matrices in experts(model, plan):
        new_up, old_up = matrices[1], network(model)[1]
        dropped = (new_up != old_up).any(dim=1)
        for new, old in zip(matrices, network(model)):
            drawn, replaced = new[dropped].double(), old[dropped].double()
            assert drawn.std() == pytest.approx(replaced.std().item(), rel=0.04)
            error_of_mean = replaced.std().item() / drawn.numel() ** 0.5
            assert abs(drawn.mean() - replaced.mean()).item() < 5 * error_of_mean
            # Normal: the share within one standard deviation; and all rows alike, unlike the rows before.
            within = ((drawn - drawn.mean()).abs() < drawn.std()).double().mean().item()
            assert within == pytest.approx(0.6827, abs=0.02)
            assert drawn.std(dim=1).max() < 1.5 * drawn.std(dim=1).min()


def test_no_two_experts_matrices_or_layers_get_the_same_numbers() -> None:
    model = dense_model(torch.float32, hidden_size=24)
    plan = UpcyclePlan(num_experts=4, top_k=2, method="drop", drop_ratio=1.0)
    drawn = [m for layer in (0, 1) for expert in experts(model, plan, layer) for m in expert]
    normed = torch.stack([((m - m.mean()) / m.std()).flatten() for m in drawn])
    correlation = normed @ normed.T / normed.shape[1]
    assert (correlation - torch.eye(len(drawn))).abs().max() < 0.3


@pytest.mark.parametrize("granularity", [1, 3])
def test_noise_is_in_units_of_each_matrix(granularity: int) -> None:
    model = dense_model(torch.float32, hidden_size=128, intermediate_size=192, num_layers=1)
    with torch.no_grad():
        for matrix, unit in zip(network(model), (0.02, 0.5, 3.0)):
            matrix.copy_(unit * torch.randn(matrix.shape) + 0.1)
    plan = UpcyclePlan(num_experts=2, top_k=1, granularity=granularity, method="noise", noise_std=0.1)
    size, noises = 192 // granularity, []
    for e, matrices in enumerate(experts(model, plan)):
        own = slice(size * (e % granularity), size * (e % granularity) + size)
        for new, old, unit in zip(matrices, network(model), (0.02, 0.5, 3.0)):
            noise = new - old[own]
            assert noise.std() == pytest.approx(0.1 * unit, rel=0.05)
            assert noise.mean().abs() < 5 * 0.1 * unit / noise.numel() ** 0.5
            noises.append((noise / noise.std()).flatten())
    correlation = torch.stack(noises) @ torch.stack(noises).T / noises[0].numel()
    assert (correlation - torch.eye(len(noises))).abs().max() < 0.06


def test_shuffled_parts_are_a_partition_of_each_copy() -> None:
    model = dense_model(torch.float64)
    plan = UpcyclePlan(num_experts=3, top_k=1, granularity=2, shuffle=True)
    made, orders = experts(model, plan), []
    for copy in range(3):
        parts = [torch.cat([made[2 * copy + part][which] for part in (0, 1)]) for which in range(3)]
        order = [int((network(model)[0] == row).all(dim=1).nonzero()) for row in parts[0]]
        assert sorted(order) == list(range(24))
        assert order != list(range(24))
        assert all(torch.equal(part, old[order]) for part, old in zip(parts, network(model)))
        orders.append(tuple(order))
    assert len(set(orders)) == 3


def test_shuffle_and_drop_go_together() -> None:
    model = dense_model(torch.float32)
    plan = UpcyclePlan(num_experts=2, top_k=1, granularity=2, shuffle=True, method="drop", drop_ratio=0.5)
    for copy in range(2):
        kept = []
        for gate, up, down in experts(model, plan)[2 * copy : 2 * copy + 2]:
            found = [[(old == row).all(dim=1).nonzero().flatten().tolist() for row in new]
                     for new, old in zip((gate, up, down), network(model))]  # fmt: skip
            assert found[0] == found[1] == found[2]
            kept += [row[0] for row in found[0] if row]
        assert len(kept) == len(set(kept)) == 12


PLANS: dict[str, dict[str, Any]] = {
    "drop": {"method": "drop", "shuffle": True, "granularity": 2},
    "noise": {"method": "noise", "shared_size": 8, "shared_gate": True},
    "copy": {"granularity": 4, "router_init": "independent"},
}


@pytest.mark.parametrize("case", PLANS)
def test_values_depend_neither_on_order_nor_on_how_they_are_read(case: str) -> None:
    model, plan = dense_model(torch.bfloat16), UpcyclePlan(**({"num_experts": 3, "top_k": 2} | PLANS[case]))
    source = UpcycledSource(ModelSource(model), plan)
    state = torch.get_rng_state()
    whole = {name: source.read(name) for name in source.names()}
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = UpcycledSource(ModelSource(model), plan)
    for name in reversed(list(again.names())):
        for index in reversed(range(whole[name].shape[0])):
            assert torch.equal(again.read(name, index), whole[name][index]), (name, index)
    other = UpcycledSource(ModelSource(model), UpcyclePlan(**(vars(plan) | {"seed": 1})))
    changed = {name for name in whole if not torch.equal(other.read(name), whole[name])}
    experts = "experts." if case != "copy" else "router"
    assert {n for n in whole if "router" in n or (experts in n and "shared" not in n)} == changed


def test_names_shapes_and_dtypes_are_those_of_the_model() -> None:
    plan = UpcyclePlan(num_experts=3, top_k=2, granularity=2, shared_size=8, shared_gate=True, layers="01")
    for model in (dense_model(torch.float16, mlp_bias=True), dense_model(tie_embeddings=True)):
        source = UpcycledSource(ModelSource(model), plan)
        with torch.device("meta"):
            wanted = {name: tensor.shape for name, tensor in Decoder(source.config).state_dict().items()}
        if model.config.tie_embeddings:
            del wanted["lm_head.weight"]
        assert list(source.names()) == list(wanted)
        for name in source.names():
            assert source.read(name).shape == wanted[name]
            assert source.read(name).dtype == source.dtype(name) == model.embed_tokens.weight.dtype


def test_a_reader_by_expert_reads_each_dense_matrix_once_and_holds_one_layer() -> None:
    model = dense_model()
    dense = CountingSource(model)
    source = UpcycledSource(dense, UpcyclePlan(num_experts=5, top_k=2, method="noise"))
    for name in source.names():
        for expert in range(5) if ".experts." in name else [None]:
            source.read(name, expert)
    assert sorted(dense.reads) == sorted(dense.names())
    assert len(source._held) == 3


def test_reading_does_not_change_the_dense_model() -> None:
    model = dense_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = UpcycledSource(ModelSource(model), UpcyclePlan(num_experts=2, top_k=1, method="drop"))
    for name in source.names():
        source.read(name).zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert source.read("layers.0.mlp.experts.down_proj").abs().sum() > 0


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "more chosen than there are": ({"top_k": 5}, r"upcycle.top_k is 5: must be at most upcycle.num_experts \(4\)"),
    "no expert": ({"num_experts": 0}, r"upcycle.num_experts is 0: must be greater than 0"),
    "parts of unequal width": ({"granularity": 5}, r"upcycle.granularity is 5: must be a divisor of .* 24"),
    "unequal beside the shared": ({"granularity": 5, "shared_size": 8}, r"a divisor of .* 16, which is 24 less"),
    "wider than the network": ({"shared_size": 25}, r"upcycle.shared_size is 25: must be at most the dense width, 24"),
    "gate without a shared expert": ({"shared_gate": True}, r"upcycle.shared_size is 0"),
    "ratio above 1": ({"drop_ratio": 1.5}, r"upcycle.drop_ratio is 1.5: must be in \[0, 1\]"),
    "ratio that is no number": ({"drop_ratio": float("nan")}, r"upcycle.drop_ratio is nan"),
    "noise below 0": ({"noise_std": -0.1}, r"upcycle.noise_std is -0.1"),
    "unknown method": ({"method": "clone"}, r"upcycle.method is 'clone': must be one of copy, drop, noise"),
    "zero router for parts": ({"granularity": 2, "router_init": "zero"}, r"upcycle.router_init is 'zero'"),
    "random router without size": ({"router_std": 0.0}, r"upcycle.router_std is 0.0"),
    "unknown layers": ({"layers": "odd"}, r'upcycle.layers is \'odd\': must be "all", "every-N"'),
    "no layer": ({"layers": "after-2"}, r"upcycle.layers is 'after-2'"),
    "every 0": ({"layers": "every-0"}, r"upcycle.layers is 'every-0'"),
    "pattern too short": ({"layers": "1"}, r"2 digits"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_plans_are_refused_by_name(case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        UpcyclePlan(**({"num_experts": 4, "top_k": 2} | fields)).config(dense_config())


def test_a_mixture_is_refused() -> None:
    plan = UpcyclePlan(num_experts=4, top_k=2)
    with pytest.raises(ConfigError, match=r"mixture-of-experts layers of the source is \[1\]: must be none"):
        plan.config(ModelConfig(num_layers=2, moe_layer_pattern=(0, 1)))


def test_a_tensor_of_another_width_is_refused_by_name() -> None:
    class Wrong(ModelSource):
        def read(self, name: str, index: int | None = None) -> Tensor:
            tensor = super().read(name, index)
            return tensor[:, :-1] if name.endswith("down_proj.weight") else tensor

    source = UpcycledSource(Wrong(dense_model()), UpcyclePlan(num_experts=2, top_k=1))
    with pytest.raises(RunError, match=r"layers.1.mlp.down_proj.weight has shape \(16, 23\): .* size 24 in dim 1"):
        source.read("layers.1.mlp.experts.down_proj", 0)
