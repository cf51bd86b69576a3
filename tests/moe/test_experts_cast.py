"""Expert weights that are cast before the call that needs them."""

import copy

import torch

from dmoe.moe import MoEConfig
from dmoe.moe.experts import Experts


def experts() -> Experts:
    made = Experts(MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, bias=True))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def run(layer: Experts, x: torch.Tensor, early: bool) -> list[torch.Tensor]:
    layer.zero_grad()
    if early:
        layer.cast_early()
    ids = torch.arange(12).remainder(4).view(6, 2)
    y = layer(x, ids, torch.full((6, 2), 0.5))
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def test_early_casts_change_no_bit_and_serve_one_call() -> None:
    layer, x = experts(), torch.randn(6, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        late, early = (run(layer, x, e) for e in (False, True))
        assert len(late) == 5
        assert all(torch.equal(a, b) for a, b in zip(late, early, strict=True))
        layer.cast_early()
        with torch.no_grad():
            layer(x, torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1))
            layer.down_proj.mul_(2)
        assert not torch.equal(run(layer, x, False)[0], late[0]), "the second call must see the weights as they are"


def test_casts_of_a_call_that_never_came_are_dropped() -> None:
    layer, x = experts(), torch.randn(6, 16)
    want = run(copy.deepcopy(layer), x, False)
    with torch.autocast("cpu", torch.bfloat16):
        layer.cast_early()
    assert all(torch.equal(a, b) for a, b in zip(run(layer, x, True), want, strict=True))
