"""`expert_mlp` and `MoE` on a GPU: both backends at real sizes and at random ones against fp64, and the whole layer.

Small and odd cases, bits and the compiler are in `tests/ops/expert_*_cases.py`, which
`test_triton_experts_gpu.py` runs for both backends.
"""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_oracle import ACTIVATIONS, DIFFERENTIABLE, Problem, make_problem, relative_error
from torch import Tensor

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))
pytest.register_assert_rewrite("expert_kernel_cases", "rows_kernel_cases")

from expert_kernel_cases import forward, gradients, on_device, setting  # noqa: E402, F401

from dmoe import MoE, MoEConfig  # noqa: E402
from dmoe.moe import Recorder  # noqa: E402
from dmoe.ops import expert_mlp  # noqa: E402

BACKENDS = ("triton", "torch")
# fp32 through tf32, which the fixture `setting` allows. Hopper cuts an operand off after 10 bits of the mantissa: the
# three products of a gated expert lose 2.3e-3.
TOLERANCE = {torch.float32: 3e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DTYPES = [("triton", d) for d in TOLERANCE] + [("torch", torch.bfloat16), ("torch", torch.float16)]

CASES: dict[str, dict[str, Any]] = {
    "uniform": {"T": 2048, "D": 512, "F": 256, "E": 32, "K": 4},
    "skewed": {"T": 1500, "D": 256, "F": 128, "E": 16, "K": 2, "skew": 3.0},
    "nearly all on one": {"T": 1000, "D": 256, "F": 128, "E": 16, "K": 1, "skew": 50.0},
    "512 experts": {"T": 700, "D": 128, "F": 64, "E": 512, "K": 8},
    "every expert chosen": {"T": 300, "D": 128, "F": 64, "E": 8, "K": 8},
    "one expert": {"T": 1000, "D": 256, "F": 128, "E": 1, "K": 1, "bias": True},
    "widths that end within a tile": {"T": 900, "D": 360, "F": 200, "E": 6, "K": 3, "bias": True},
    "plain": {"T": 1000, "D": 256, "F": 384, "E": 8, "K": 2, "gated": False, "bias": True},
}


def routed_problem(*, skew: float = 0.0, **sizes: Any) -> Problem:
    """A problem whose tokens choose expert e with a logit lower by skew * log(1 + e)."""
    p = make_problem(**sizes)
    E, K = p.down.shape[0], p.topk_ids.shape[1]
    scores = torch.randn(len(p.x), E) - skew * torch.arange(1, E + 1).log()
    return replace(p, topk_ids=scores.topk(K).indices)


def check(p: Problem, backend: str) -> None:
    """Output and gradients against the reference backend in fp64 on the GPU."""
    dtype = p.x.dtype
    grad = torch.randn(p.x.shape).to(dtype)
    wide = {n: getattr(p, n).double() for n in DIFFERENTIABLE if getattr(p, n) is not None}
    want_y, want = gradients(replace(p, **wide), "reference", grad.double())
    y, got = gradients(p, backend, grad)
    assert y.dtype == dtype
    assert relative_error(y, want_y) <= TOLERANCE[dtype]
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == getattr(p, name).dtype
        assert relative_error(got[name], want[name]) <= TOLERANCE[dtype], name


@pytest.mark.parametrize(("backend", "dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_fp64(case: str, backend: str, dtype: torch.dtype) -> None:
    check(routed_problem(**CASES[case], dtype=dtype), backend)


def random_sizes(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    experts = draw.choice([1, 3, 8, 17, 60, 128, 512])
    activation = draw.choice(ACTIVATIONS[:-1])  # without the clamp, at which rounding turns the derivative on or off
    return {
        "T": draw.choice([2, 31, 128, 500, 1111, 3000]),
        "D": draw.choice([8, 64, 72, 200, 512, 1000, draw.randrange(1, 600)]),
        "F": draw.choice([8, 64, 88, 136, 256, 704, draw.randrange(1, 400)]),
        "E": experts,
        "K": min(experts, draw.choice([1, 2, 3, 4, 6, 8])),
        "gated": draw.random() < 0.7,
        "bias": draw.random() < 0.5,
        "activation": activation,
        "skew": draw.choice([0.0, 0.0, 1.0, 4.0]),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(12))
def test_random_sizes(seed: int, backend: str) -> None:
    dtype = torch.float16 if seed % 4 == 3 else torch.bfloat16
    check(routed_problem(**random_sizes(seed), dtype=dtype), backend)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("triton", d) for d in TOLERANCE] + [("torch", torch.bfloat16)], ids=str
)
def test_does_not_synchronise_with_the_host(backend: str, dtype: torch.dtype, bias: bool) -> None:
    q, leaves = on_device(make_problem(T=256, D=64, F=32, E=8, K=2, bias=bias, dtype=dtype))
    grad = torch.randn_like(q.x)

    def run() -> None:
        torch.autograd.grad(forward(q, backend), list(leaves.values()), grad)
        with torch.no_grad():
            forward(q, backend)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    """fp32 arguments: bf16 out, gradients in fp32."""
    p = routed_problem(T=200, D=128, F=64, E=8, K=2, bias=True)
    q, leaves = on_device(p)
    grad = torch.randn(p.x.shape, device="cuda").bfloat16()
    want_y, want = gradients(p, "reference", grad.float())
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = forward(q, backend)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.detach(), want_y) <= 2e-2
    y.backward(grad)
    for name, leaf in leaves.items():
        assert leaf.grad.dtype == torch.float32
        assert relative_error(leaf.grad, want[name]) <= 2e-2, name


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.bfloat16, "highest"), (torch.float32, "high"), (torch.float32, "highest")], ids=str
)
def test_compiled_without_a_named_backend(dtype: torch.dtype, precision: str) -> None:
    """The compiler follows the choice of the backend, and chooses again when what it depends on changes."""

    def run(*tensors: Tensor) -> Tensor:
        return expert_mlp(*tensors)  # type: ignore[arg-type]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True)
    q, _ = on_device(make_problem(T=300, D=64, F=32, E=8, K=2, bias=True, dtype=dtype))
    torch.set_float32_matmul_precision("high" if precision == "highest" else "highest")
    compiled(*q.tensors())
    torch.set_float32_matmul_precision(precision)
    assert torch.equal(compiled(*q.tensors()), run(*q.tensors()))


def test_moe_compiled_under_autocast_equals_eager() -> None:
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
    layer = MoE(MoEConfig(hidden_size=128, intermediate_size=64, num_experts=8, top_k=2), device="cuda").eval()
    x: Tensor = torch.randn(512, 128, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        whole, part = layer(x), layer(x[:3])
    torch.testing.assert_close(whole[:3], part, rtol=2e-2, atol=1e-4)
