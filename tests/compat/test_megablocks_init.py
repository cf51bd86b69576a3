"""Initial weights of the MegaBlocks interface: names, shapes, and every bit of a seeded layer."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from megablocks_oracle import arguments
from torch import Tensor, nn

from dmoe.compat.megablocks.layers import dmoe, moe, mpu
from dmoe.compat.megablocks.layers.arguments import Arguments


def linear(n_in: int, n_out: int, bias: bool, dtype: torch.dtype) -> list[Tensor]:
    """The draws of `nn.Linear`: Kaiming uniform with a = sqrt(5), and its bias."""
    bound = 1 / math.sqrt(n_in)
    drawn = [torch.empty(n_out, n_in, dtype=dtype).uniform_(-bound, bound)]
    return [*drawn, torch.empty(n_out, dtype=dtype).uniform_(-bound, bound)] if bias else drawn


def drawn_by_hand(args: Arguments, dropless: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """The random numbers in the order in which MegaBlocks draws them."""
    experts, features, width = args.moe_num_experts, args.ffn_hidden_size, args.hidden_size

    def draw(method) -> Tensor:
        w = torch.empty(experts, features, width, dtype=dtype)
        method(w)
        return w

    linear(width, experts, False, dtype)  # overwritten
    want = {"router.layer.weight": torch.empty(experts, width, dtype=dtype)}
    args.init_method(want["router.layer.weight"])
    w1, w2 = draw(args.init_method), draw(args.output_layer_init_method)
    if dropless:  # the experts with a capacity were made and thrown away
        w1, w2 = draw(args.init_method), draw(args.output_layer_init_method)
        want["experts.mlp.w1"], want["experts.mlp.w2"] = w1.reshape(-1, width), w2.reshape(-1, width)
        if args.mlp_type == "glu":
            want["experts.mlp.v1"] = draw(args.init_method).reshape(-1, width)
    else:
        want["experts.mlp.w1"], want["experts.mlp.w2"] = w1.transpose(1, 2), w2
    if args.bias:
        want["experts.bias"] = torch.zeros(width, dtype=dtype)
    if args.shared_expert:
        size = args.shared_expert_hidden_size
        parts = {"up_proj": (width, size), "down_proj": (size, width)}
        if args.mlp_type == "glu":
            parts["gate_proj"] = (width, size)
        for name, (n_in, n_out) in parts.items():
            drawn = linear(n_in, n_out, args.bias, torch.float32)
            want.update({f"shared_expert.{name}.{part}": t for part, t in zip(("weight", "bias"), drawn)})
    return want


@pytest.mark.filterwarnings("ignore:mlp_type is 'glu'")
def test_seeded_weights_are_those_of_megablocks_bit_by_bit() -> None:
    cases = product(
        (dmoe.dMoE, moe.MoE), ("mlp", "glu"), (1, 3, 8), (True, False), (True, False), ("sparse", "grouped"), (0, 1, 2)
    )
    for cls, mlp_type, experts, bias, shared, impl, kind in cases:
        dtype = (torch.float32, torch.bfloat16, torch.float16)[kind]
        args = arguments(
            hidden_size=10, ffn_hidden_size=6, moe_num_experts=experts, mlp_type=mlp_type, mlp_impl=impl, bias=bias,
            shared_expert=shared, shared_expert_hidden_size=7, bf16=kind == 1, fp16=kind == 2,
            init_method=lambda w: nn.init.trunc_normal_(w, std=0.5), output_layer_init_method=nn.init.uniform_,
        )  # fmt: skip
        torch.manual_seed(3)
        layer = cls(args)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        want = drawn_by_hand(args, cls is dmoe.dMoE, dtype)
        state = layer.state_dict()
        assert state.keys() == want.keys()
        for name, value in want.items():
            assert state[name].dtype == value.dtype, name
            assert torch.equal(state[name], value), (cls, mlp_type, experts, name)
        assert torch.equal(torch.get_rng_state(), after)


def test_default_initialisation() -> None:
    layer = dmoe.dMoE(arguments(hidden_size=64, ffn_hidden_size=64, moe_num_experts=4, mlp_type="glu"))
    for name, p in layer.named_parameters():
        if "bias" not in name:
            assert abs(p.std().item() - 0.02) < 0.002, name


def test_names_and_shapes_of_olmoe() -> None:
    """A layer of the published 1B-7B model, on the meta device."""
    args = arguments(
        hidden_size=2048, ffn_hidden_size=1024, moe_num_experts=64, moe_top_k=8, mlp_type="glu", bias=False,
        device="meta",
    )  # fmt: skip
    shapes = {name: tuple(p.shape) for name, p in dmoe.dMoE(args).state_dict().items()}
    assert shapes == {
        "router.layer.weight": (64, 2048), "experts.mlp.w1": (65536, 2048), "experts.mlp.w2": (65536, 2048),
        "experts.mlp.v1": (65536, 2048),
    }  # fmt: skip
    args.mlp_type = "mlp"
    shapes = {name: tuple(p.shape) for name, p in moe.MoE(args).state_dict().items()}
    assert shapes["experts.mlp.w1"] == (64, 2048, 1024)
    assert shapes["experts.mlp.w2"] == (64, 1024, 2048)


@pytest.mark.parametrize("cls", [dmoe.dMoE, moe.MoE])
def test_meta_device(cls: type[nn.Module]) -> None:
    args = arguments(moe_num_experts=3, moe_top_k=2, device="meta", shared_expert=True, return_bias=False)
    layer = cls(args)
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    args.device = "cpu"
    real = cls(args)
    layer = layer.to_empty(device="cpu")
    layer.load_state_dict(real.state_dict())
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), real(x))
    moe.clear_load_balancing_loss()


@pytest.mark.parametrize("cls", [dmoe.dMoE, moe.MoE])
def test_marks_copies_and_small_experts(cls: type[nn.Module]) -> None:
    layer = cls(arguments(moe_num_experts=2, hidden_size=3, ffn_hidden_size=1, return_bias=False))  # F * E < 128
    for name, p in layer.named_parameters():
        assert mpu.is_moe_param(p) == (".mlp." in name)
        assert mpu.param_is_expert_model_parallel(p) is False
    x = torch.randn(4, 3)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    nn.init.ones_(twin.experts.mlp.w1)
    assert not torch.equal(twin(x), layer(x))
    moe.clear_load_balancing_loss()
