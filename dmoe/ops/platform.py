"""Whether Triton kernels run on a device, and running operators there."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor

from dmoe.ops.precision import autocast_off

Result = TypeVar("Result")

_HAS_TRITON = find_spec("triton") is not None
# With these Triton builds the stub that launches a kernel, on any GPU.
_HAS_COMPILER = "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))


def is_hopper(device: torch.device) -> bool:
    """Whether kernels for compute capability 9.0 run there."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def runs_triton(device: torch.device) -> bool:
    """A GPU with bf16 products (compute capability 8.0, or AMD's), or Triton's interpreter: TRITON_INTERPRET=1."""
    if not _HAS_TRITON:
        return False
    if device.type == "cuda":
        # The compiler would warn of the cache, and ignore it.
        return _HAS_COMPILER and (_is_new_enough if torch.compiler.is_compiling() else _known_new_enough)(device)
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_new_enough(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


_known_new_enough = functools.lru_cache(_is_new_enough)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one. If it is so already, without a change, which would take the host a while."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return contextlib.nullcontext() if is_current else torch.cuda.device(device)


def on_its_device(function: Callable[..., Result]) -> Callable[..., Result]:
    """For the body of an operator: its first tensor's GPU is the current one, where Triton launches, and autocast off.

    A backward may be called under autocast, which would round its fp32 products.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Result:
        first = next(arg for arg in args if isinstance(arg, Tensor))
        with _current(first.device), autocast_off(first):
            return function(*args, **kwargs)

    return run
