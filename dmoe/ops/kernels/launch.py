"""How a kernel is launched: its tile, and how many programs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """The configuration of one tile kernel."""

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    group_m: int = 8
    """Blocks of rows that share a block of columns before the next one is taken."""
    split: int = 2
    """Parts in which a tile is stored; more need less shared memory, which may then hold another stage."""
    warps: int = 8
    stages: int = 3
    flatten: bool = True
    """One software pipeline over all tiles of a program: the next tile is loaded while this one is stored."""


@functools.lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Programs of a persistent kernel: one for each multiprocessor. Off the GPU, in the interpreter, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
