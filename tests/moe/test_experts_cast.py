"""Expert weights that are cast before the call that needs them."""

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
    cast = layer.cast_weights() if early else None
    ids = torch.arange(12).remainder(4).view(6, 2)
    y = layer(x, ids, torch.full((6, 2), 0.5), cast=cast)
    y.float().square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]


def test_early_casts_change_no_bit() -> None:
    layer, x = experts(), torch.randn(6, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer.cast_weights()
        assert cast is not None
        assert cast[0].dtype == cast[1].dtype == torch.bfloat16
        late, early = (run(layer, x, e) for e in (False, True))
    assert len(late) == 5
    assert all(torch.equal(a, b) for a, b in zip(late, early, strict=True))


def test_nothing_is_cast_without_autocast() -> None:
    assert experts().cast_weights() is None
