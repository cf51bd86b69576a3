"""`lora_expert_mlp` against autograd through W + scale * B A in the reference backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmoe.lora import expert_mlp as expert_mlp_module
from dmoe.lora.expert_mlp import ExpertAdapters, lora_expert_mlp
from dmoe.ops import expert_mlp

SCALE = 1.7
# T, K, E, D, F, r; what is special
SHAPES = {
    "experts no power of two": (17, 2, 5, 8, 12, 3),
    "no token": (0, 2, 3, 8, 8, 2),
    "one token": (1, 2, 4, 8, 8, 1),
    "one expert": (9, 1, 1, 8, 8, 4),
    "every expert": (6, 4, 4, 8, 4, 2),
    "widths that no kernel takes": (11, 2, 3, 5, 7, 2),
}
CHOICES = [("silu", True, True), ("gelu", False, False), ("clamped_swiglu", True, False)]


def case(
    shape: tuple[int, ...], dtype: torch.dtype, *, gated: bool, bias: bool, skew: bool = False
) -> dict[str, Tensor]:
    T, K, E, D, F, r = shape
    H = 2 * F if gated else F
    generator = torch.Generator().manual_seed(T + E)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    scores = torch.rand(T, E, generator=generator)
    if skew:  # the last expert gets no token, and one pick in four is of no expert
        scores[:, -1] = -1.0
    ids = scores.topk(K, dim=1).indices
    if skew:
        ids = ids.masked_fill(torch.rand(T, K, generator=generator) < 0.25, E)
    tensors = {
        "x": randn(T, D), "ids": ids, "weights": torch.rand(T, K, generator=generator, dtype=torch.float64),
        "w1": randn(E, H, D), "w2": randn(E, D, F), "up_A": randn(E, r, D), "up_B": randn(E, H, r),
        "down_A": randn(E, r, F), "down_B": randn(E, D, r),
    }  # fmt: skip
    if bias:
        tensors |= {"b1": randn(E, H), "b2": randn(E, D)}
    tensors["weights"] = tensors["weights"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    return tensors


INSIDE = {
    torch.ops.dmoe.lora_expert_mlp.default: expert_mlp_module._forward._init_fn,
    torch.ops.dmoe.lora_expert_mlp_backward.default: expert_mlp_module._backward._init_fn,
}
TRAINED = ("x", "weights", "up_A", "up_B", "down_A", "down_B")


def run(t: dict[str, Tensor], activation: str, *, oracle: bool) -> dict[str, Tensor]:
    t = {name: v.clone().requires_grad_(name in TRAINED) for name, v in t.items()}
    biases = t.get("b1"), t.get("b2")
    if oracle:
        w1 = t["w1"] + SCALE * torch.einsum("ehr,erd->ehd", t["up_B"], t["up_A"])
        w2 = t["w2"] + SCALE * torch.einsum("edr,erf->edf", t["down_B"], t["down_A"])
        y = expert_mlp(t["x"], t["ids"], t["weights"], w1, w2, *biases, activation=activation, backend="reference")
    else:
        adapters = ExpertAdapters(t["up_A"], t["up_B"], t["down_A"], t["down_B"])
        y = lora_expert_mlp(
            t["x"], t["ids"], t["weights"], t["w1"], t["w2"], *biases, adapters, scale=SCALE, activation=activation
        )
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), **{name: t[name].grad for name in TRAINED}}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_effective_weights(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for activation, gated, bias in CHOICES:
        for skew in (False, True) if shape[2] > shape[1] else (False,):
            exact = case(shape, torch.float64, gated=gated, bias=bias, skew=skew)
            rounded = {n: v if n in ("ids", "weights") else v.to(dtype) for n, v in exact.items()}
            if dtype != torch.float64:
                rounded["weights"] = rounded["weights"].float()
            wide = {n: v if n == "ids" else v.double() for n, v in rounded.items()}
            got, wanted = run(rounded, activation, oracle=False), run(wide, activation, oracle=True)
            tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
            for name, value in wanted.items():
                assert got[name].shape == value.shape
                error = (got[name].double() - value).abs().max().item() if value.numel() else 0.0
                scale = max(value.abs().max().item(), 1e-30) if value.numel() else 1.0
                assert error <= tolerance * scale, f"{activation} {name}: off by {error / scale:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zero_B_changes_no_bit(dtype: torch.dtype) -> None:
    t = case((33, 2, 5, 16, 24, 3), dtype, gated=True, bias=True, skew=True)
    adapters = ExpertAdapters(t["up_A"], t["up_B"] * 0, t["down_A"], t["down_B"] * 0)
    args = (t["x"], t["ids"], t["weights"], t["w1"], t["w2"], t["b1"], t["b2"])
    ours = lora_expert_mlp(*args, adapters, scale=SCALE)
    assert torch.equal(ours, expert_mlp(*args, backend="torch"))


def test_nothing_of_the_size_of_the_experts_is_kept_or_made() -> None:
    """Beside activations: the largest tensor of a step, and what the graph keeps."""
    shape = T, K, E, _, F, r = (32, 2, 24, 64, 96, 4)
    t = case(shape, torch.float32, gated=True, bias=False)
    weights = {t["w1"].data_ptr(), t["w2"].data_ptr()}
    rows = T * K * 2 * F  # elements of the largest activation
    factors = E * 2 * F * r
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in INSIDE:  # what an operator does inside is not seen from outside
                with self:
                    return INSIDE[func](*args)
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in weights:
                    made.append(tensor.untyped_storage().nbytes() // 4)
            return result

    names = ("up_A", "up_B", "down_A", "down_B")
    adapters = ExpertAdapters(*(t[name].requires_grad_() for name in names))
    with Watch():
        lora_expert_mlp(
            t["x"], t["ids"], t["weights"], t["w1"], t["w2"], None, None, adapters, scale=1.0
        ).sum().backward()
    assert t["w1"].numel() > 10 * max(rows, factors)
    assert max(made) <= 2 * max(rows, factors)
