"""`expert_mlp` and `MoE` on a GPU, against the reference backend in fp64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmoe import MoE, MoEConfig
from dmoe.moe import Recorder
from dmoe.ops import expert_mlp

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def problem(
    T: int, D: int, F: int, E: int, K: int, *, gated: bool = True, bias: bool = False, skew: bool = False
) -> tuple[list[Tensor], Tensor, Tensor]:
    """fp64 CPU leaves [x, weights, gate_up, down, (biases)], ids, output gradient; values exact in bf16."""
    g = torch.Generator().manual_seed(T + 7 * D + E)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=g) * std).bfloat16().double()

    H = 2 * F if gated else F
    logits = torch.randn(T, E, generator=g)
    if skew:
        logits[:, 0] += 100
        logits[:, E // 2 :] -= 100
    weights, ids = logits.softmax(-1).topk(K)
    leaves = [normal(T, D), weights.double(), normal(E, H, D, std=D**-0.5), normal(E, D, F, std=F**-0.5)]
    if bias:
        leaves += [normal(E, H), normal(E, D)]
    return [leaf.requires_grad_() for leaf in leaves], ids, normal(T, D)


def run(leaves: list[Tensor], ids: Tensor, grad: Tensor, **kwargs: object) -> list[Tensor]:
    x, weights, *rest = leaves
    y = expert_mlp(x, ids, weights, *rest, **kwargs)  # type: ignore[arg-type]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


CASES = {
    "uniform": {"T": 300, "D": 64, "F": 32, "E": 8, "K": 2},
    "seven experts": {"T": 257, "D": 64, "F": 48, "E": 7, "K": 3},
    "k = E": {"T": 64, "D": 64, "F": 32, "E": 4, "K": 4},
    "one expert": {"T": 64, "D": 64, "F": 32, "E": 1, "K": 1},
    "all on one, most get none": {"T": 128, "D": 64, "F": 32, "E": 16, "K": 1, "skew": True},
    "one token": {"T": 1, "D": 64, "F": 32, "E": 8, "K": 2},
    "no token": {"T": 0, "D": 64, "F": 32, "E": 8, "K": 2},
    "odd widths": {"T": 50, "D": 20, "F": 5, "E": 4, "K": 2},
    "plain": {"T": 100, "D": 64, "F": 32, "E": 8, "K": 2, "gated": False},
    "bias": {"T": 100, "D": 64, "F": 32, "E": 8, "K": 2, "bias": True},
    "large": {"T": 2048, "D": 512, "F": 256, "E": 32, "K": 4},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_fp64_reference(case: str, dtype: torch.dtype) -> None:
    leaves, ids, grad = problem(**CASES[case])  # type: ignore[arg-type]
    expected = run(leaves, ids, grad, backend="reference")
    # Freed memory full of NaN: a kernel that does not write an empty group's gradient shows.
    torch.full((64, 1024, 1024), float("nan"), device="cuda", dtype=dtype)
    on_gpu = [leaf.detach().to("cuda", torch.float32 if i == 1 else dtype) for i, leaf in enumerate(leaves)]
    actual = run([t.requires_grad_() for t in on_gpu], ids.cuda(), grad.to("cuda", dtype), backend="torch")
    for got, want in zip(actual, expected):
        error = (got.cpu().double() - want).norm() / want.norm().clamp_min(1e-12)
        assert error <= TOLERANCE[dtype]


def test_bf16_does_not_synchronise_with_the_host() -> None:
    dtype = torch.bfloat16
    leaves, ids, grad = problem(T=256, D=64, F=32, E=8, K=2, bias=True)
    on_gpu = [leaf.detach().to("cuda", dtype).requires_grad_() for leaf in leaves]
    ids, grad = ids.cuda(), grad.to("cuda", dtype)
    run(on_gpu, ids, grad)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(on_gpu, ids, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_expanded_gradient() -> None:
    leaves, ids, _ = problem(T=64, D=64, F=32, E=8, K=2)
    x, weights, gate_up, down = (leaf.detach().to("cuda", torch.bfloat16).requires_grad_() for leaf in leaves)
    expert_mlp(x, ids.cuda(), weights, gate_up, down).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_moe_compiled_under_autocast_equals_eager() -> None:
    torch.manual_seed(0)
    config = MoEConfig(hidden_size=128, intermediate_size=64, num_experts=16, top_k=4, shared_intermediate_size=64)
    layer = MoE(config, device="cuda")
    recorder = Recorder(layer)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(4, 64, 128, device="cuda")
    results = []
    for function in (layer, compiled):
        layer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y = function(x)
        y.float().square().mean().backward()
        recorder.update()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    for eager, inductor in zip(*results):
        assert (eager.float() - inductor.float()).norm() <= 2e-2 * eager.float().norm()
    assert sum(recorder.summary()[""].tokens_per_expert) == 2 * 4 * 64 * 4


def test_output_of_a_token_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    layer = MoE(MoEConfig(hidden_size=128, intermediate_size=64, num_experts=8, top_k=2), device="cuda").eval()
    x = torch.randn(512, 128, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        whole, part = layer(x), layer(x[:3])
    torch.testing.assert_close(whole[:3], part, rtol=2e-2, atol=1e-4)
