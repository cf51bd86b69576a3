"""The dtype that an `Arguments` asks for, and the cast that autocast does not do by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmoe.ops.precision import autocast_dtype

if TYPE_CHECKING:
    from dmoe.compat.megablocks.layers.arguments import Arguments


def dtype(args: Arguments) -> torch.dtype | None:
    """Of the parameters: float16 with `args.fp16` (whatever `bf16` says), bfloat16 with `args.bf16`, else None."""
    if args.fp16:
        return torch.float16
    return torch.bfloat16 if args.bf16 else None


def cast_if_autocast_enabled(tensor: Tensor) -> Tensor:
    """`tensor` in the autocast dtype of its device where autocast is on.

    Integers and float64 stay as they are, which is what autocast itself does.
    """
    return tensor.to(autocast_dtype(tensor)) if tensor.dtype.is_floating_point else tensor
