"""Run by test_fp8.py with TRITON_INTERPRET=1: the kernels against the expressions that they replace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import faster_interpreter
import numpy as np
import torch
import triton.language as tl
from dense_oracle import DIFFERENTIABLE, make_problem, relative_error
from no_expert import drop, dropped_gradient
from torch import Tensor
from triton.runtime import interpreter

from dmoe.ops import expert_mlp, fp8, scaled
from dmoe.ops.activations import ACTIVATIONS
from dmoe.ops.kernels import activations, products
from dmoe.ops.kernels import fp8 as kernels
from dmoe.ops.kernels.launch import Tile
from dmoe.ops.scaled import fused_kernels


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.empty` and its kin with NaN: what a kernel does not write shows."""

    def poisoned_empty(*args: Any, **kwargs: Any) -> Tensor:
        t = empty(*args, **kwargs)
        return t.fill_(float("nan")) if t.is_floating_point() else t

    return poisoned_empty


def convert_float(x: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    """The interpreter's own rounding to 8 bits loses the carry out of the mantissa, and NaN; a GPU's does not."""
    if target.name != "fp8e4nv":
        return _convert_float(x, source, target, rounding)
    assert source.name == "fp32"
    return torch.from_numpy(x.view(np.float32).copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


_convert_float, interpreter._convert_float = interpreter._convert_float, convert_float
# Interpreted, a constexpr times a tensor is a constexpr, which tl.exp refuses.
for _name, _value in [*vars(activations).items()]:
    if isinstance(_value, tl.constexpr):
        setattr(activations, _name, _value.value)
torch.empty_like = poisoned(torch.empty_like)
Tensor.new_empty = poisoned(Tensor.new_empty)  # type: ignore[method-assign]


def same_bits(got: Tensor, want: Tensor, name: str) -> None:
    assert got.shape == want.shape, name
    assert got.dtype == want.dtype, name
    a, b = got.float(), want.float()
    different = ~((a == b) | (a.isnan() & b.isnan()))
    assert not different.any(), (
        f"{name}: {different.sum()} of {different.numel()}: {a[different][:5]} {b[different][:5]}"
    )


def same_scaled(got: tuple[Tensor, Tensor], want: scaled.Scaled, name: str) -> None:
    same_bits(got[0], want.values, f"{name} values")
    same_bits(got[1], want.scales, f"{name} scales")


def hard(rows: Tensor) -> Tensor:
    rows[0], rows[1, 3], rows[2, 1], rows[3] = 0, float("nan"), float("inf"), rows[3] * 1e-30
    rows[4, 0], rows[5], rows[6] = 1e4, 448 * 2.0**-3, 450 * 2.0**-3
    return rows


def main() -> None:
    faster_interpreter.install()
    torch.manual_seed(0)
    kernels._TILE_M, kernels._TILE_N = 32, 16  # several tiles a matrix
    order = torch.randperm(27)
    inverse = torch.empty(27, dtype=torch.int32).scatter_(0, order, torch.arange(27, dtype=torch.int32)).view(9, 3)
    for dtype in (torch.float32, torch.bfloat16):
        rows = hard(torch.randn(9, 80)).to(dtype)
        same_scaled(kernels.quantise_rows(rows), scaled.quantise_rows(rows), "quantise_rows")
        want = scaled.quantise_picks(rows, order // 3, inverse)
        same_scaled(kernels.quantise_rows(rows, inverse), want, "quantise_rows to picks")
        weights = torch.stack([hard(torch.randn(48, 40)), torch.randn(48, 40)]).to(dtype)
        same_scaled(kernels.quantise_columns(weights), scaled.quantise_columns(weights), "quantise_columns")
    assert kernels.quantise_rows(torch.empty(0, 32))[0].shape == (0, 32)

    for bias in (False, True):
        check_whole(bias, "none")
    check_whole(True, "some")
    check_whole(True, "all")
    for name in ACTIVATIONS:
        for gated in (True, False) if name != "clamped_swiglu" else (True,):
            check_activation(name, gated)


def check_activation(name: str, gated: bool) -> None:
    F = 48
    h = (torch.randn(6, 2 * F if gated else F) * 4).bfloat16()
    h[2] = 0
    grad = torch.randn(6, F).bfloat16()
    grad[3] = 0
    scale = torch.rand(6, 1) + 0.1
    scale[4] = 0  # a row that only pads
    bias, experts = torch.randn(2, h.shape[1]).bfloat16(), torch.tensor([0, 1, 1, 0, 1, 1])
    got_h, want_h = h.clone(), h.clone()
    a8 = scaled.Scaled(*kernels.activate_rows(got_h, bias, experts, scale, name, gated))
    want8 = fp8._activate(want_h, bias, experts, scale, name, gated)
    assert (got_h - want_h).abs().max() <= 2**-6 * want_h.abs().max()  # interpreted, rounding to bf16 truncates
    a8 = scaled.Scaled(*kernels.activate_rows(h, None, experts, scale, name, gated))
    want8 = fp8._activate(h, None, experts, scale, name, gated)
    same_bits(a8.scales, want8.scales, f"{name} scales")
    # The activation's last fp32 bits differ, and a number next to a tie then falls to its other side.
    assert (a8.values.float() != want8.values.float()).float().mean() < 0.02, name
    torch.testing.assert_close(scaled.dequantise(a8), scaled.dequantise(want8), rtol=0.13, atol=1e-6)

    *got, values, scales = kernels.activate_backward_rows(grad, h, scale, name, gated)
    *want, _ = fp8._activate_backward(grad, h, scale, name, gated)
    for g, w, what in zip(got, want, ("grad_h", "a", "grad_s")):
        assert g.dtype == w.dtype, what
        torch.testing.assert_close(g, w, rtol=1e-2, atol=1e-5, msg=lambda m, what=what: f"{name} {gated} {what}: {m}")
    same_scaled((values, scales), scaled.quantise_rows(got[0]), f"{name} grad_h")


def check_whole(bias: bool, dropped: str) -> None:
    """The steps of a Hopper GPU put together, with the products of 8-bit numbers as elsewhere; of some of the picks."""
    p = make_problem(9, 32, 5, 2, 48, only_experts=[0, 1, 2, 4], bias=bias, dtype=torch.bfloat16)
    p, _ = drop(p, dropped)
    grad = dropped_gradient(p, float("nan"))

    def run() -> list[Tensor]:
        leaves = {n: getattr(p, n).clone().requires_grad_() for n in DIFFERENTIABLE if getattr(p, n) is not None}
        y = expert_mlp(*replace(p, **leaves).tensors(), precision="fp8")
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad)]

    want = run()
    taken = []

    def exact_product(left: Tensor, right: Tensor, offsets: Tensor, tile: Tile) -> Tensor:
        taken.append(tile)
        small = replace(tile, block_m=32, block_n=32, block_k=16)
        return weight_gradient(left.float(), right.float(), offsets, small).to(left.dtype)

    fp8.fused_kernels = scaled.fused_kernels = lambda t: kernels  # type: ignore[assignment]
    weight_gradient, products.weight_gradient = products.weight_gradient, exact_product  # bf16 is wrong, interpreted
    try:
        got = run()
    finally:
        fp8.fused_kernels = scaled.fused_kernels = fused_kernels
        products.weight_gradient = weight_gradient
    assert len(taken) == (4 if bias else 2)
    for g, w in zip(got, want):
        assert g.dtype == w.dtype
        # Truncation instead of rounding, again: the fewer rows, the less of it averages out.
        assert relative_error(g, w.double()) <= (2e-2 if dropped == "none" else 4e-2)


if __name__ == "__main__":
    main()
