"""`megablocks.grouped_gemm_util`: products of groups of rows with a matrix each; `ops.gmm` and `backend.gmm`.

The package grouped_gemm is not needed: one grouped product of torch for bf16 on a GPU, a product for each group
elsewhere. Legend: T rows, E groups, `batch_sizes[e]` rows of group e, K, M and N widths.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dmoe.config import require
from dmoe.ops.precision import autocast_dtype, autocast_off


def grouped_gemm_is_available() -> bool:
    """True: the products come with this package."""
    return True


def assert_grouped_gemm_is_available() -> None:
    """Nothing to assert; see `grouped_gemm_is_available`."""


def _check(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool) -> None:
    require(not (trans_a and trans_b), "trans_a, trans_b", (trans_a, trans_b), "at most one of them True")
    require(a.dim() == 2, "a.shape", tuple(a.shape), "[rows, width]")
    require(batch_sizes.dim() == 1, "batch_sizes.shape", tuple(batch_sizes.shape), "[groups]")
    require(
        not batch_sizes.dtype.is_floating_point and batch_sizes.dtype != torch.bool,
        "batch_sizes.dtype", batch_sizes.dtype, "an integer dtype",
    )  # fmt: skip
    require(b.dtype == a.dtype, "b.dtype", b.dtype, f"{a.dtype}, that of a")
    if trans_a:
        require(b.dim() == 2 and len(b) == len(a), "b.shape", tuple(b.shape), f"[{len(a)}, width], the rows of a")
    else:
        groups, inner = batch_sizes.numel(), a.shape[1]
        wanted = f"[{groups}, columns, {inner}]" if trans_b else f"[{groups}, {inner}, columns]"
        fits = b.dim() == 3 and b.shape[0] == groups and b.shape[2 if trans_b else 1] == inner
        require(fits, "b.shape", tuple(b.shape), wanted)
    if batch_sizes.device.type == "cpu":  # elsewhere the host would wait
        total, smallest = int(batch_sizes.sum()), min(batch_sizes.tolist(), default=0)
        require(total == len(a), "the sum of batch_sizes", total, f"{len(a)}, the rows of a")
        require(smallest >= 0, "the least of batch_sizes", smallest, "0 or greater")


def _aligned(t: Tensor) -> bool:
    """Whether the grouped kernel can read it: one unit stride of the last two, the other of a multiple of 16 bytes."""
    inner, outer = sorted(t.stride()[-2:])
    start = t.data_ptr() if not torch.compiler.is_compiling() else 0
    return inner == 1 and outer * t.element_size() % 16 == 0 and start % 16 == 0


def _runs_grouped(a: Tensor, b: Tensor) -> bool:
    """Whether torch has one kernel for all groups: elsewhere it too goes through a loop."""
    return a.device.type == "cuda" and a.dtype == torch.bfloat16 and len(a) > 0 and _aligned(a) and _aligned(b)


def _by_groups(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, c: Tensor) -> Tensor:
    sizes = batch_sizes.tolist()
    if trans_a:
        for left, right, out in zip(a.split(sizes), b.split(sizes), c):
            torch.mm(left.t(), right, out=out)
    else:
        for rows, matrix, out in zip(a.split(sizes), b, c.split(sizes)):
            torch.mm(rows, matrix, out=out)
    return c


def _product(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False, c: Tensor | None = None
) -> Tensor:
    """`backend.gmm`, of the values alone."""
    _check(a, b, batch_sizes, trans_a, trans_b)
    b = b.transpose(1, 2) if trans_b else b
    shape = (batch_sizes.numel(), a.shape[1], b.shape[1]) if trans_a else (a.shape[0], b.shape[2])
    if c is not None:
        require(c.shape == shape and c.dtype == a.dtype, "c", (tuple(c.shape), c.dtype), f"{shape}, {a.dtype}")
    with autocast_off(a), torch.no_grad():
        if _runs_grouped(a, b):
            ends = batch_sizes.to(a.device, non_blocking=True).cumsum(0, dtype=torch.int32)
            out = F.grouped_mm(a.t() if trans_a else a, b, offs=ends)
            return out if c is None else c.copy_(out)
        return _by_groups(a, b, batch_sizes, trans_a, a.new_empty(shape) if c is None else c)


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool) -> Tensor:
        ctx.save_for_backward(
            a if ctx.needs_input_grad[1] else None, b if ctx.needs_input_grad[0] else None, batch_sizes
        )
        ctx.trans_b = trans_b
        return _product(a, b, batch_sizes, trans_b=trans_b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        a, b, batch_sizes = ctx.saved_tensors
        grad, grad_a, grad_b = grad.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            grad_a = _product(grad, b, batch_sizes, trans_b=not ctx.trans_b)
        if ctx.needs_input_grad[1]:
            left, right = (grad, a) if ctx.trans_b else (a, grad)
            grad_b = _product(left, right, batch_sizes, trans_a=True)
        return grad_a, grad_b, None, None


def _gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """[T, N]: the rows of group e times `b[e]`, or its transpose with `trans_b`. Differentiable in a and b.

    Args:
        a: [T, K], floating point, rows grouped.
        b: [E, K, N], or [E, N, K] with `trans_b`; the dtype of a. Under autocast both are cast.
        batch_sizes: integer [E], in sum T. On any device: on the CPU nothing waits; on a GPU the host waits for them,
            except for bf16 with rows of a multiple of 16 bytes.

    Raises:
        ConfigError: shapes, dtypes or sizes that do not fit.
    """
    dtype = autocast_dtype(a)
    return _GroupedProduct.apply(a.to(dtype), b.to(dtype) if dtype != a.dtype else b, batch_sizes, trans_b)


def _backend_gmm(
    a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool = False, trans_b: bool = False, c: Tensor | None = None
) -> Tensor:
    """The product of `ops.gmm` without its autograd; with `trans_a` the other one.

    Args:
        a, b, batch_sizes, trans_b: see `ops.gmm`.
        trans_a: [E, M, N] from a [T, M] and b [T, N]: for each group the sum over its rows of a (outer) b; zeros for a
            group without rows.
        c: written and returned, in place of a new tensor.
    """
    return _product(a, b, batch_sizes, trans_a, trans_b, c)


ops = SimpleNamespace(gmm=_gmm)
backend = SimpleNamespace(gmm=_backend_gmm)
