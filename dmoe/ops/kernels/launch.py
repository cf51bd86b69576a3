"""How a kernel is launched: its tile, and how many programs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist


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


WAVES_BESIDE_COLLECTIVES = 4
"""Programs for each multiprocessor where collectives may run at the same time. They hold some multiprocessors, and a
program that waits for one of those would keep the whole kernel waiting: with several, others take over most of its
tiles. Which program computes a tile changes no bit."""


def num_programs(device: torch.device) -> int:
    """Programs of a persistent kernel: one for each multiprocessor, and several in a process group."""
    shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return _num_multiprocessors(device) * (WAVES_BESIDE_COLLECTIVES if shared else 1)


@functools.lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    """Off the GPU, in the interpreter, a few."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
