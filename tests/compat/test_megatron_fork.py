"""The Megatron fork that trains with MegaBlocks: flags, adapter, loss. The oracles are loops over experts."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.compat.megablocks.layers import arguments, mpu
from dmoe.compat.megablocks.layers.dmoe import dMoE
from dmoe.compat.megablocks.layers.moe import (
    MoE,
    batched_load_balancing_loss,
    clear_load_balancing_loss,
    get_load_balancing_loss,
)

D, E, T = 16, 4, 40


def parse(*flags: str) -> argparse.Namespace:
    """The flags that matter here, with the fork's types and defaults, and what its checks fill in."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "moe-num-experts"):
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--moe-capacity-factor", type=int, default=0)
    parser.add_argument("--moe-top-k", type=int, default=1)
    parser.add_argument("--moe-loss-weight", type=float, default=0.1)
    parser.add_argument("--moe-lbl-in-fp32", type=bool, default=False)
    parser.add_argument("--moe-jitter-eps", type=float)
    parser.add_argument("--moe-use-megatron-switch", type=bool, default=False)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--num-layers-per-virtual-pipeline-stage", type=int)
    parser.add_argument("--init-method-std", type=float, default=0.02)
    for flag in ("moe-expert-model-parallelism", "glu", "fp16", "bf16"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = parser.parse_args(
        [
            "--num-layers",
            "1",
            "--hidden-size",
            str(D),
            "--num-attention-heads",
            "2",
            "--moe-num-experts",
            str(E),
            *flags,
        ]
    )
    args.ffn_hidden_size = args.ffn_hidden_size or 4 * args.hidden_size
    return args


class Adapter(nn.Module):
    """What the fork puts in the place of a layer's MLP."""

    def __init__(self, megatron_args: argparse.Namespace, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        args = arguments.from_megatron(megatron_args)
        args.device = torch.device("cpu")
        args.init_method = partial(nn.init.normal_, std=megatron_args.init_method_std)
        args.output_layer_init_method = partial(nn.init.normal_, std=megatron_args.init_method_std / 2)
        if args.moe_expert_model_parallelism:
            args.expert_parallel_group = group
        if megatron_args.glu:
            args.mlp_type = "glu"
        self.args = args
        self.moe = MoE(args) if megatron_args.moe_capacity_factor > 0 else dMoE(args)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.moe.forward(x)


@pytest.fixture(autouse=True)
def _no_losses_left() -> Any:
    clear_load_balancing_loss()
    yield
    clear_load_balancing_loss()


def loop(adapter: Adapter, x: Tensor, capacity: int | None = None) -> Tensor:
    """Every expert in turn, in float64. An expert takes at most `capacity` picks, in the order of the tokens."""
    moe, mlp = adapter.moe, adapter.moe.experts.mlp
    x_TD = x.detach().double().reshape(-1, D)
    scores_TE = (x_TD @ moe.router.layer.weight.double().t()).softmax(-1)
    weights_TK, ids_TK = scores_TE.topk(adapter.args.moe_top_k)
    w1, w2 = mlp.w1.double(), mlp.w2.double()
    w1 = w1.transpose(1, 2) if w1.dim() == 3 else w1.view(E, -1, D)
    y_TD = torch.zeros_like(x_TD)
    for e in range(E):
        picks = (ids_TK == e).nonzero()[:capacity]
        for t, k in picks.tolist():
            hidden = F.gelu(w1[e] @ x_TD[t], approximate="tanh")
            if hasattr(mlp, "v1"):
                hidden = hidden * (mlp.v1.double().view(E, -1, D)[e] @ x_TD[t])
            y_TD[t] += weights_TK[t, k] * (hidden @ w2.view(E, -1, D)[e])
    return y_TD.view(x.shape)


def spread_out(adapter: Adapter) -> Adapter:
    """Weights large enough that a wrong one shows."""
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter


def test_fields_of_the_recipe() -> None:
    namespace = parse(
        "--num-layers", "6", "--hidden-size", "512", "--moe-num-experts=64", "--moe-capacity-factor=0", "--moe-top-k=2",
        "--moe-loss-weight=0.01", "--moe-jitter-eps=0.01", "--moe-lbl-in-fp32=True", "--bf16",
        "--moe-expert-model-parallelism", "--pipeline-model-parallel-size=2",
    )  # fmt: skip
    args = arguments.from_megatron(namespace)
    shared = set(vars(namespace)) & set(vars(args))
    assert shared >= {name for name in vars(namespace) if name.startswith("moe") and name != "moe_use_megatron_switch"}
    assert {name: getattr(args, name) for name in shared} == {name: getattr(namespace, name) for name in shared}
    assert (args.hidden_size, args.ffn_hidden_size, args.num_layers, args.moe_num_experts) == (512, 2048, 6, 64)
    assert (args.fp16, args.bf16, args.moe_loss_weight, args.moe_capacity_factor) == (False, True, 0.01, 0)
    # What has no flag keeps MegaBlocks' default.
    default = arguments.Arguments()
    for name in set(vars(args)) - shared - {"shared_expert_hidden_size"}:
        assert getattr(args, name) == getattr(default, name), name


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [((), torch.float32), (("--bf16",), torch.bfloat16), (("--fp16",), torch.float16)],
)
def test_dtype_of_the_parameters(flags: tuple[str, ...], dtype: torch.dtype) -> None:
    adapter = Adapter(parse(*flags))
    assert {parameter.dtype for name, parameter in adapter.named_parameters() if "bias" not in name} == {dtype}


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_dropless(glu: bool, top_k: int) -> None:
    adapter = spread_out(Adapter(parse(f"--moe-top-k={top_k}", *(["--glu"] if glu else []))))
    assert isinstance(adapter.moe, dMoE)
    assert hasattr(adapter.moe.experts.mlp, "v1") == glu
    x = torch.randn(T // 2, 2, D)  # Megatron's [sequence, batch, width]
    out, bias = adapter(x)
    torch.testing.assert_close(out.double(), loop(adapter, x), rtol=1e-5, atol=1e-5)
    assert bias is adapter.moe.experts.bias or torch.equal(bias, adapter.moe.experts.bias)


@pytest.mark.parametrize("factor", [1, 2])
def test_capacity(factor: int) -> None:
    adapter = spread_out(Adapter(parse(f"--moe-capacity-factor={factor}")))
    assert type(adapter.moe) is MoE
    x = torch.randn(T // 2, 2, D)
    out, _ = adapter(x)
    expected, dropless = loop(adapter, x, factor * T // E), loop(adapter, x)
    dropped = (expected != dropless).any(-1).sum()
    assert dropped > 0 or factor == 2
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_loss_of_a_pipeline_stage() -> None:
    """E w / (L T K) * sum of count * mean score over this stage's layers; L counts the layers of all stages."""
    flags = ("--num-layers=4", "--pipeline-model-parallel-size=2", "--moe-loss-weight=0.02", "--moe-lbl-in-fp32=True")
    adapters = [spread_out(Adapter(parse(*flags))) for _ in range(2)]
    expected = 0.0
    for adapter in adapters:
        x = torch.randn(T, 1, D)
        adapter(x)
        scores_TE = (x.view(T, D).double() @ adapter.moe.router.layer.weight.double().t()).softmax(-1)
        counts_E = scores_TE.argmax(-1).bincount(minlength=E)
        expected = expected + E * 0.02 / (4 * T) * (counts_E * scores_TE.mean(0)).sum()
    loss = batched_load_balancing_loss(adapters[0].args)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    assert all(adapter.moe.router.layer.weight.grad.abs().max() > 0 for adapter in adapters)
    adapters[0](x)  # a third layer on a stage of two
    with pytest.raises(ValueError, match="2"):
        batched_load_balancing_loss(adapters[0].args)


def test_no_loss_is_kept_in_evaluation() -> None:
    adapter = Adapter(parse()).eval()
    adapter(torch.randn(T, 1, D))
    assert not get_load_balancing_loss()


def test_jitter() -> None:
    """Noise on the router's input while training, and never on what the experts see."""
    adapter = spread_out(Adapter(parse("--moe-jitter-eps=0.1")))
    with torch.no_grad():
        adapter.moe.router.layer.weight.mul_(0.05)  # picks may change, the outputs then do by much
    x = torch.randn(T, 1, D)
    first, second = adapter(x)[0], adapter(x)[0]
    assert not torch.equal(first, second)
    adapter.eval()
    torch.testing.assert_close(adapter(x)[0].double(), loop(adapter, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(adapter(x)[0], adapter(x)[0])


def test_expert_parallelism_over_the_data_parallel_group(tmp_path: Path) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        plain = spread_out(Adapter(parse("--glu")))
        spread = Adapter(parse("--glu", "--moe-expert-model-parallelism"), dist.group.WORLD)
        spread.load_state_dict(plain.state_dict())
        x = torch.randn(T, 1, D)
        torch.testing.assert_close(spread(x)[0], plain(x)[0], rtol=1e-6, atol=1e-6)
        # Megatron's DDP, optimiser and gradient clipping read these.
        for name, parameter in spread.moe.experts.mlp.named_parameters():
            assert mpu.param_is_expert_model_parallel(parameter), name
        assert not mpu.param_is_expert_model_parallel(spread.moe.router.layer.weight)
        assert not any(mpu.param_is_expert_model_parallel(p) for p in plain.parameters())
    finally:
        dist.destroy_process_group()


def test_state_dict_names_of_the_fork() -> None:
    f = 4 * D
    shapes = {name: tuple(value.shape) for name, value in Adapter(parse("--glu")).state_dict().items()}
    assert shapes == {
        "moe.router.layer.weight": (E, D), "moe.experts.bias": (D,), "moe.experts.mlp.w1": (E * f, D),
        "moe.experts.mlp.w2": (E * f, D), "moe.experts.mlp.v1": (E * f, D),
    }  # fmt: skip
    shapes = {name: tuple(v.shape) for name, v in Adapter(parse("--moe-capacity-factor=1")).state_dict().items()}
    assert shapes == {
        "moe.router.layer.weight": (E, D), "moe.experts.bias": (D,), "moe.experts.mlp.w1": (E, D, f),
        "moe.experts.mlp.w2": (E, f, D),
    }  # fmt: skip
