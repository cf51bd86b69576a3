"""Autocast, also where a device has none (the meta device)."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which matrix products of `x` run: the autocast dtype where that is on, fp64 excepted."""
    return torch.get_autocast_dtype(x.device.type) if in_autocast(x) else x.dtype


def in_autocast(x: Tensor) -> bool:
    """Whether autocast is on for `x`: on its device, and fp64 excepted."""
    device = x.device.type
    return x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device)


def autocast_off(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of `x`."""
    device = x.device.type
    is_off = device == "meta" or not torch.is_autocast_enabled(device)
    return contextlib.nullcontext() if is_off else torch.autocast(device, enabled=False)


def allows_tf32() -> bool:
    """Whether fp32 products on a GPU may go through tf32, by whichever of torch's two ways of saying so.

    The compiler traces the older one alone, which raises an error after the newer one was used.
    """
    matmul = torch.backends.cuda.matmul
    return bool(matmul.allow_tf32) if torch.compiler.is_compiling() else matmul.fp32_precision == "tf32"
