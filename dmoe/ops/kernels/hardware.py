"""Instructions of NVIDIA GPUs that Triton's language does not have, with a plain form for everything else."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def _probe():
    pass


# False in the interpreter and on other GPUs.
NVIDIA = tl.constexpr(torch.version.hip is None and not isinstance(_probe, InterpretedFunction))
_MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of an fp32 tile, with a relative error of 2**-22.

    The plain expression takes three times as many instructions, for results below the normal range and for the last bit
    of the division, and it is most of what an epilogue computes.
    """
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1; add.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
            "=&f,f", [x * _MINUS_LOG2_E], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def prefetch(pointers):
    """Bring the cache lines (128 bytes) of these addresses into the L2 cache."""
    if NVIDIA:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(tl.int64)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
