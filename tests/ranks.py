"""Ranks of a test: processes that call one function, without the seconds that each would take to import torch."""

import multiprocessing
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch.multiprocessing

# Imported once for all ranks of a test process. What starts threads or reads the environment does not belong here.
_IMPORTED = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "dmoe.train.loop",
]


def run_ranks(function: Callable[..., Any], args: tuple[Any, ...], world: int) -> None:
    """As `torch.multiprocessing.spawn`: calls function(rank, *args) in `world` processes and raises what one raises.

    They are forked from a process with one thread that has only imported modules, so that nothing of the test or of
    another rank is in them. The environment is that of the first call, with a single thread for OpenMP; a rank that a
    signal ends says where it was.
    """
    multiprocessing.set_forkserver_preload(_IMPORTED)
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}):
        torch.multiprocessing.start_processes(function, args, nprocs=world, start_method="forkserver")
